"""How many processes, and what their exit codes become."""

import pytest

from moe_lm.distributed import expert_processes
from moe_lm.group import Group, divided
from moe_lm.launch import _outcome, check_num_processes
from moe_lm.mistake import Mistake
from moe_lm.sizes import Step


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ({0: 2, 1: -15}, 2, None),  # a mistake: the launcher ended the others
        ({0: 75, 1: 75}, 75, None),  # asked to stop
        ({0: 130}, 130, None),
        ({0: 1, 1: 2}, 2, None),  # one made the mistake, the other lost it
        ({0: 1, 1: 75}, 75, None),
        ({1: -9}, 1, "process 1 was killed by SIGKILL"),
        ({0: -15, 1: -9}, 1, "process 1 was killed by SIGKILL"),
        ({0: 1, 2: -9}, 1, "process 2 was killed by SIGKILL"),
        ({0: -15}, 1, "process 0 was killed by SIGTERM"),
    ],
)
def test_one_exit_code_of_several(capsys, codes, code, said):
    assert _outcome(codes) == code
    err = capsys.readouterr().err
    assert (said in err and len(err.splitlines()) == 1) if said else err == ""


def test_as_many_processes_as_gpus():
    check_num_processes(8, 8)
    check_num_processes(3, None)
    for number, gpus, words in [(0, None, "at least 1"), (-2, 4, "at least 1"), (9, 8, "8 GPUs"), (2, 1, "1 GPU")]:
        with pytest.raises(Mistake, match=words):
            check_num_processes(number, gpus)


@pytest.mark.parametrize(
    ("total", "size", "together", "sizes"),
    [
        (6, 4, 1, (2, 2, 1, 1)),
        (2, 3, 1, (1, 1, 0)),
        (793_471, 8, 1, (99_184,) * 7 + (99_183,)),
        (15, 4, 3, (6, 3, 3, 3)),  # 5 groups of 3: whole
        (12, 2, 3, (6, 6)),
        (6, 3, 3, (2, 2, 2)),  # 2 groups, 3 processes: cut
    ],
)
def test_rows_are_divided_evenly_and_in_order(total, size, together, sizes):
    shares = [divided(total, Group(rank, size), together) for rank in range(size)]
    assert all(share.sizes == sizes and share.total == total for share in shares)
    assert [number for share in shares for number in share.rows] == list(range(total))


def test_as_many_share_the_experts_as_find_one_each():
    assert [expert_processes(8, experts) for experts in (0, 1, 2, 3, 4, 7, 8, 256)] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert [expert_processes(6, experts) for experts in (1, 2, 3, 5, 6)] == [1, 2, 3, 3, 6]
    assert expert_processes(8, 256, 2) == 2
    assert Step(words=90, micro_words=9, num_processes=6).expert_processes_of(4) == 3
