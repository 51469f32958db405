"""A gate that learns by a loss is not trained without it."""


def test_strictly_balanced_needs_its_loss(workspace, moe_lm, training):
    """One line names the loss, before anything is trained."""
    outcome = moe_lm("train", *training, "gate@model.layers.middle.gate=strictly_balanced")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("moe-lm: the gate of model.layers.middle learns by the balance loss")
    assert "'balance=[importance,load,batchwise]'" in outcome.err
    assert not list(workspace.glob("runs/*/checkpoints"))
