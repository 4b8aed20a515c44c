from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.task import load_task
from p2pfl.learning.vector import assign, flatten, initial, layout, load_model, notes, save_model


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight


def with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


sizes = st.lists(st.integers(1, 6), min_size=2, max_size=5)


@settings(deadline=None, max_examples=50)
@given(sizes=sizes, norm=st.booleans(), data=st.data())
def test_a_vector_survives_a_model(sizes, norm, data):
    layers: list[nn.Module] = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    if norm:
        layers.append(nn.BatchNorm1d(sizes[-1]))
    model = nn.Sequential(*layers)
    size = layout(model).size
    numbers = data.draw(st.lists(st.floats(width=32), min_size=size, max_size=size))
    vector = np.array(numbers, dtype=np.float32)
    vector.flags.writeable = False
    assign(model, vector)
    assert flatten(model).tobytes() == vector.tobytes() or np.isnan(vector).any()
    np.testing.assert_array_equal(flatten(model), vector)


def test_the_order_is_that_of_the_state(tmp_path):
    model = with_norm()
    described = layout(model)
    assert described.names[:4] == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert described.names[4:] == ("1.running_mean", "1.running_var", "2.weight", "2.bias")
    assert described.shapes[0] == (4, 3)
    assert described.size == 12 + 4 * 5 + 8 + 2
    np.testing.assert_array_equal(flatten(model)[:12], model[0].weight.detach().numpy().reshape(-1))


def test_flatten_is_a_copy_and_assign_keeps_nothing():
    for model in (nn.Linear(2, 2), nn.Linear(2, 2, bias=False)):
        vector = flatten(model)
        before = vector.copy()
        with torch.no_grad():
            model.weight.zero_()
        np.testing.assert_array_equal(vector, before)
        assign(model, vector)
        vector[:] = 9
        np.testing.assert_array_equal(flatten(model), before)


def test_integer_buffers_stay():
    model = with_norm()
    model(torch.randn(5, 3))
    assign(model, np.zeros(layout(model).size, dtype=np.float32))
    assert int(model[1].num_batches_tracked) == 1
    assert float(model[1].running_var.sum()) == 0


def test_tied_weights_travel_once(tmp_path):
    model = Tied()
    assert layout(model).size == 15
    assign(model, np.arange(15, dtype=np.float32))
    assert model.out.weight is model.embed.weight
    assert model.out.weight[4, 2].item() == 14
    save_model(tmp_path / "m.safetensors", model, {})
    other = Tied()
    load_model(tmp_path / "m.safetensors", other)
    np.testing.assert_array_equal(flatten(other), flatten(model))


def test_channels_last_is_flattened_row_major():
    model = nn.Conv2d(3, 4, 3)
    expected = flatten(model)
    model = model.to(memory_format=torch.channels_last)
    np.testing.assert_array_equal(flatten(model), expected)
    assign(model, expected)
    np.testing.assert_array_equal(flatten(model), expected)


def test_half_precision_travels_as_float32():
    model = nn.Linear(2, 2).to(torch.bfloat16)
    vector = flatten(model)
    assert vector.dtype == np.float32
    assign(model, vector)
    np.testing.assert_array_equal(flatten(model), vector)
    assert "not float32" in notes(model)[0]


@pytest.mark.parametrize(
    "vector", [np.zeros(7, np.float32), np.zeros(5, np.float32), np.zeros(6, np.float64), np.zeros((1, 6), np.float32)]
)
def test_another_models_vector_is_refused(vector):
    model = nn.Linear(2, 2)
    before = flatten(model)
    with pytest.raises(InvalidConfig, match=r"for a model of float32 \[6\]"):
        assign(model, vector)
    np.testing.assert_array_equal(flatten(model), before)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.ReLU(), "nothing to train"),
        (nn.Linear(2, 2, dtype=torch.complex64), "weight is complex"),
    ],
)
def test_models_that_have_no_vector(model, expected):
    with pytest.raises(InvalidConfig, match=expected):
        layout(model)
    with pytest.raises(InvalidConfig, match=expected):
        flatten(model)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_have_no_vector():
    with pytest.raises(InvalidConfig, match="no shape yet"):
        layout(nn.LazyLinear(2))


def test_notes_tell_of_what_averaging_does():
    assert notes(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2), nn.Dropout())) == []
    (line,) = notes(with_norm())
    for word in ("1:", "running mean", "num_batches_tracked", "GroupNorm"):
        assert word in line
    assert notes(nn.BatchNorm1d(2, track_running_stats=False)) == []
    model = nn.Linear(2, 2)
    model.register_buffer("steps", torch.tensor(3))
    assert notes(model) == ["steps: not floating point, so it stays with each peer and is never averaged"]


def test_initial_depends_on_the_seed_alone():
    task = load_task("digits", Path()).task
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = initial(task, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    np.testing.assert_array_equal(initial(task, 7), first)
    assert not np.array_equal(initial(task, 8), first)


def test_a_saved_model_comes_back_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    model, other = with_norm(), with_norm()
    model(torch.randn(5, 3))
    save_model(path, model, {"round": "12"})
    assert load_model(path, other) == {"round": "12"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    save_model(path, model, {"round": "13"})
    assert load_model(path, other) == {"round": "13"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (nn.Linear(3, 4), r"tensor 'weight' has shape \[4, 3\], the model needs \[2, 2\]"),
        (nn.Linear(2, 2, bias=False), r"no tensor 'bias' of shape \[2\]"),
        (nn.Bilinear(2, 2, 2), r"tensor 'weight' has shape \[2, 2, 2\]"),
        (nn.Linear(2, 2, dtype=torch.float64), r"tensor 'weight' holds torch.float64, the model needs torch.float32"),
    ],
)
def test_another_model_in_the_file_is_refused(saved, expected, tmp_path):
    save_model(tmp_path / "m.safetensors", saved, {})
    model = nn.Linear(2, 2)
    before = flatten(model)
    with pytest.raises(InvalidConfig, match=expected):
        load_model(tmp_path / "m.safetensors", model)
    np.testing.assert_array_equal(flatten(model), before)


def test_an_extra_tensor_is_refused(tmp_path):
    save_model(tmp_path / "m.safetensors", nn.Linear(2, 2), {})
    with pytest.raises(InvalidConfig, match=r"tensor 'bias' of shape \[2\] is not in the model"):
        load_model(tmp_path / "m.safetensors", nn.Linear(2, 2, bias=False))


def test_files_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(InvalidConfig, match="there is no model file"):
        load_model(tmp_path / "none.safetensors", nn.Linear(2, 2))
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04K\x01." * 10)
    with pytest.raises(InvalidConfig, match="not a readable safetensors file"):
        load_model(tmp_path / "bad.safetensors", nn.Linear(2, 2))
    with pytest.raises(InvalidConfig, match="cannot write"):
        save_model(tmp_path / "no" / "m.safetensors", nn.Linear(2, 2), {})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_model(path, nn.Linear(2, 2), {"round": "1"})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InvalidConfig, match="No space left"):
        save_model(path, nn.Linear(2, 2), {"round": "2"})
    assert load_model(path, nn.Linear(2, 2)) == {"round": "1"}
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
