"""A gate that learns by a loss is not trained without it."""


def test_strictly_balanced_needs_its_loss(workspace, moe_lm, training):
    """One line names the loss, before anything is trained."""
    outcome = moe_lm("train", *training, "gate@model.layers.middle.gate=strictly_balanced")
    assert outcome.code == 2
    line = outcome.err.splitlines()[-1]
    assert line.startswith("moe-lm: the gate model.layers.middle.gate learns by the balance loss batchwise")
    assert "'balance=[importance,batchwise]'" in outcome.err
    assert not list(workspace.glob("runs/*/checkpoints"))


def test_its_loss_needs_a_weight(workspace, moe_lm, training):
    """Thresholds that no gradient reaches would never be learned."""
    gate = "gate@model.layers.middle.gate=strictly_balanced"
    outcome = moe_lm("train", *training, gate, "balance=[batchwise]", "balance.batchwise.weight=0")
    assert outcome.code == 2
    assert "balance.batchwise.weight=0" in outcome.err.splitlines()[-1]


def test_the_loss_needs_such_a_gate(workspace, moe_lm, training):
    """A loss that would teach nobody is refused too."""
    outcome = moe_lm("train", *training, "balance=[batchwise]")
    assert outcome.code == 2
    assert "the balance loss batchwise has no gradient for model.layers.middle.gate" in outcome.err.splitlines()[-1]


def test_gates_of_two_kinds_train_together(workspace, moe_lm, training):
    """The loss of one is 0 for the other."""
    extra = ["+layer@model.layers.extra=moe", "model.order=[lower,extra,middle,upper]"]
    gate = "gate@model.layers.extra.gate=strictly_balanced"
    outcome = moe_lm("train", *training, *extra, gate, "balance=[batchwise,importance,load]")
    assert outcome.code == 0, outcome.err
