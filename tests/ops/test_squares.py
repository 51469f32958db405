"""What makes experts' gradients and what updates them tell each other: squares of gradients, and copies in 16 bits.

Kernels run in Triton's interpreter, products in float16, as its products of bfloat16 are wrong.
"""

import copy
import io
import os

import pytest
import torch
from experts_trained import Training
from made import Made

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from moe_lm.ops import grouped_gemm, squares
from moe_lm.ops.rounded import kept_rounded, rounded
from moe_lm.ops.squares import Squares, note_squares, squares_of, want_squares
from moe_lm.ops.triton import factored_adam as triton_factored
from moe_lm.optim import factored_adam as factored
from moe_lm.optim.adam import Adam


@pytest.fixture
def passes(monkeypatch):
    """As on a GPU with very many experts; says how often gradients were passed over for their squares."""
    asked, real = [], triton_factored.square_means
    monkeypatch.setattr(triton_factored, "square_means", lambda g: [asked.append(tuple(g.shape)), real(g)][1])
    for module in (factored, grouped_gemm):
        monkeypatch.setattr(module, "by_triton", lambda _: True)
    monkeypatch.setattr(grouped_gemm, "most_in_torch", 0)
    return asked


def squares_are_right(training):
    """What the optimizer takes are the squares of the gradients that there are."""
    for weight in training.weights:
        made = squares_of(weight, triton_factored.square_means)
        square = weight.grad.double().square()
        torch.testing.assert_close(made.row_MR.double(), square.mean(dim=2), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(made.column_MC.double(), square.mean(dim=1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("by", ["mixture", "products"])
def test_gradients_are_squared_as_they_are_made(passes, by, recompute):
    """No pass over them; the update's averages take these squares."""
    training = Training(by)
    training.backward(recompute=recompute)
    squares_are_right(training)
    gradients = [weight.grad.clone() for weight in training.weights]
    training.optimizer.step()
    assert passes == []
    for weight, gradient in zip(training.weights, gradients, strict=True):
        state = training.optimizer.state[weight]
        torch.testing.assert_close(state["row_mean"], 0.1 * gradient.square().mean(dim=2), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(state["column_mean"], 0.1 * gradient.square().mean(dim=1), rtol=1e-4, atol=1e-9)


def changed_by(change):
    """A gradient's change between its making and the update."""

    def made(training):
        training.backward()
        for weight in training.weights:
            change(weight)

    return made


def other_memory(weight):
    weight.grad = 2 * weight.grad


def second_micro_batch(training):
    training.backward()
    training.backward()


def another_view(weight):
    """Over the same memory, in another order."""
    rows, columns = weight.shape[1:]
    weight.grad = weight.grad.view(-1, columns, rows).mT


def after_none(training):
    """The last step's squares are no longer those of any gradient, whatever memory the next one takes."""
    training.backward()
    for weight in training.weights:
        weight.grad = None
        weight.grad = torch.randn(weight.shape, generator=training.generator)


@pytest.mark.parametrize(
    "make_gradients",
    [
        changed_by(lambda weight: weight.grad.mul_(2)),
        changed_by(other_memory),
        changed_by(another_view),
        second_micro_batch,
        after_none,
    ],
    ids=["in place", "replaced", "another view", "added to", "of another pass"],
)
def test_changed_gradients_are_squared_anew(passes, make_gradients):
    """By a pass over them, once for norm and update."""
    training = Training()
    make_gradients(training)
    squares_are_right(training)
    training.optimizer.norms(training.weights)
    training.optimizer.step()
    assert passes == [tuple(weight.shape) for weight in training.weights]


def test_of_shared_out_rows_there_are_no_squares(passes, monkeypatch):
    """Where several programs make one tile, its sums are whole only afterwards."""
    from moe_lm.ops.triton import tiles

    shared = tiles.tiles_of(torch.tensor([700]), 700)
    from moe_lm.ops.triton.outer_products import outer_products

    x_AD, grad_AH = torch.randn(700, 16), torch.randn(700, 24)
    found = outer_products(x_AD, None, grad_AH, shared, torch.float32, squares=True)
    assert found[1] is None
    torch.testing.assert_close(found[0][0], x_AD.t() @ grad_AH, rtol=1e-4, atol=1e-4)


def test_squares_are_made_for_who_wants_them_alone(passes):
    """An optimizer that takes none is told none."""
    training = Training()
    for weight in training.weights:
        del weight.squares
    training.backward()
    assert not hasattr(training.weights[0], "squares")


def test_a_sum_over_processes_changes_a_gradient(monkeypatch):
    """torch does not count what its messages write: who knows a gradient's squares must be told."""
    from moe_lm.parallel import group

    weight = torch.nn.Parameter(torch.ones(2, 3, 4))
    want_squares(weight)
    weight.grad = torch.ones(2, 3, 4)
    note_squares(weight, weight.grad, Squares(torch.ones(2, 3), torch.ones(2, 4)))
    monkeypatch.setattr(group.dist, "all_reduce", lambda tensor, **_: tensor.data.mul_(2))
    group.Group(size=2).all_reduce_async_(weight.grad, "gradients")
    assert squares_of(weight, triton_factored.square_means).row_MR.tolist() == [[4.0] * 3] * 2


@pytest.mark.parametrize("by", ["mixture", "products"])
def test_copies_stay_and_change_nothing(passes, by):
    """Weights after three steps are bit for bit those of matrices that are read in 32 bits; the copy is theirs."""
    sparing, keeping = Training(by), Training(by)
    for _ in range(3):
        sparing.step(recompute=True)
        keeping.step()
        for weight, other in zip(keeping.weights, sparing.weights, strict=True):
            assert torch.equal(weight, other)
            assert torch.equal(kept_rounded(weight), weight.half())
            assert kept_rounded(other) is None


def test_copies_are_made_once(passes):
    """Later steps cast no matrix."""
    training = Training()
    training.step()
    first = [kept_rounded(weight) for weight in training.weights]
    with Made() as made:
        training.step()
    assert [kept_rounded(weight) for weight in training.weights] == first
    numbers = training.weights[0].numel()
    assert 2 * numbers not in made.sizes()  # bytes


def test_what_a_left_out_update_does_not_write_stays_stale(passes):
    """The parameter was changed since its copy was made, and nobody has asked for the copy before the update."""
    training = Training()
    training.step()
    with torch.no_grad():
        for weight in training.weights:
            weight.mul_(2)
    training.backward(recompute=True)
    training.optimizer.found_inf = torch.ones(())
    training.optimizer.step()
    for weight in training.weights:
        assert torch.equal(rounded(weight, torch.float16), weight.half())


def test_a_graph_from_before_an_update_is_refused(passes):
    """Its matrices are no longer those that it went forwards with; torch says so of its own updates, too."""
    training = Training()
    training.step()
    training.backward()
    weight = training.weights[0]
    of_copy, of_itself = (rounded(weight, torch.float16) * weight).sum(), (weight * weight).sum()
    training.optimizer.step()
    for graph in (of_copy, of_itself):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            graph.backward()


def test_another_optimizer_neither_keeps_copies_nor_wants_squares(passes):
    """torch's fused Adam changes parameters unseen: the recipe that takes over drops what the last one promised."""
    training, recipe = (
        Training(),
        {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "clip_norm": 1.0},
    )
    experts = torch.nn.ParameterDict({"w1_EDH": training.weights[0]})
    for kind, kept in (("factored", True), ("adam", False), ("factored", True)):
        Adam(**recipe, experts=kind, vocabulary="lazy").build(experts)
        assert hasattr(training.weights[0], "rounded") == kept
        assert hasattr(training.weights[0], "squares") == kept
        rounded(training.weights[0], torch.float16)


def changed_in_place(weight):
    with torch.no_grad():
        weight.mul_(2)


def other_data(weight):
    weight.data = 2 * weight.data


def other_data_where_the_first_was(weight):
    """As the allocator gives freed memory again."""
    for _ in range(4):
        weight.data = 3 * weight.data
        rounded(weight, torch.float16)
        weight.data = weight.data + 1


@pytest.mark.parametrize("change", [changed_in_place, other_data, other_data_where_the_first_was])
def test_copies_of_what_was_changed_are_made_anew(passes, change):
    """As a checkpoint's loading does, or a model's move."""
    training = Training()
    training.step()
    for weight in training.weights:
        change(weight)
        assert torch.equal(rounded(weight, torch.float16), weight.half())


def test_a_copy_that_an_evaluation_made_serves_training(passes):
    """Also one in inference mode, whose tensors autograd refuses."""
    training = Training()
    with torch.inference_mode():
        for weight in training.weights:
            rounded(weight, torch.float16)
    training.step()
    assert torch.equal(kept_rounded(training.weights[0]), training.weights[0].half())


def test_torchs_operators_leave_no_copy_behind(passes, monkeypatch):
    """Updated by them, a parameter is changed and its copy made anew; in another type as well."""
    training = Training()
    training.step()
    monkeypatch.setattr(factored, "by_triton", lambda _: False)
    training.step()
    weight = training.weights[0]
    assert torch.equal(rounded(weight, torch.float16), weight.half())
    assert torch.equal(rounded(weight, torch.bfloat16), weight.bfloat16())
    assert rounded(weight, torch.float32) is None


def test_nobody_keeps_copies_for_other_optimizers(passes):
    """Without one that writes them there are none."""
    training = Training()
    for weight in training.weights:
        del weight.rounded
    training.backward()
    assert rounded(training.weights[0], torch.float16) is None


def test_a_saved_parameter_has_neither(passes):
    """What is noted holds for these tensors in this process."""
    training = Training()
    training.step()
    weight = training.weights[0]
    assert isinstance(weight.squares, squares._Noted)
    saved = io.BytesIO()
    torch.save(weight, saved)
    saved.seek(0)
    for other in (copy.deepcopy(weight), torch.load(saved, weights_only=False)):
        assert getattr(other, "squares", None) is None
        assert getattr(other, "rounded", None) is None
