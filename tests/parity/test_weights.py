"""Files that torch itself writes, read without torch."""

import collections

import ml_dtypes
import numpy as np
import pytest

from mljax.errors import UserError
from mljax.weights.files import read

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}
FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
OTHERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool", "complex64", "complex128"]


@pytest.fixture(params=FORMATS)
def saved(request, tmp_path):
    def save(tree):
        torch.save(tree, tmp_path / "x.pth", **FORMATS[request.param])
        return tmp_path / "x.pth"

    return save


def numbers(tensor):
    """A tensor's values in numpy, by torch's own conversion."""
    wide = {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
    return tensor.detach().to(torch.float32).numpy() if tensor.dtype in wide else tensor.detach().numpy()


def test_every_dtype(saved):
    base = torch.linspace(0, 30, 12).reshape(3, 4)
    state = {name: base.to(getattr(torch, name)) for name in FLOATS + OTHERS}
    found = read(saved(state))
    assert set(found) == set(state)
    for name, tensor in state.items():
        wanted = numbers(tensor)
        assert found[name].dtype == np.dtype(getattr(ml_dtypes, name, name)), name
        np.testing.assert_array_equal(found[name].astype(wanted.dtype), wanted, err_msg=name)


def test_every_stride(saved):
    base = torch.arange(120, dtype=torch.float32).reshape(4, 5, 6)
    state = collections.OrderedDict(
        whole=base,
        transposed=base.permute(2, 0, 1),
        part=base[1:3, ::2, 2:],
        expanded=base[0, 0, :1].expand(7),
        scalar=base[1, 2, 3],
        empty=base[:0],
        channels_last=torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        parameter=torch.nn.Parameter(base.clone()),
    )
    found = read(saved({"state_dict": state, "epoch": 3}))
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], numbers(tensor), err_msg=name)


def test_training_checkpoint(saved):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    optimiser = torch.optim.AdamW(model.parameters())
    model[2](torch.ones(1, 4)).sum().backward()
    optimiser.step()
    tree = {
        "model": torch.nn.DataParallel(model).state_dict(),
        "optimizer": optimiser.state_dict(),
        "best": np.float64(3.5),
        "device": torch.device("cpu"),
        "shape": torch.ones(2, 3).shape,
        "dtype": torch.float16,
    }
    found = read(saved(tree), prefix="module.")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
        assert found[name].shape == tuple(tensor.shape)


def test_tensor_with_attributes(saved):
    tensor = torch.nn.Parameter(torch.arange(4.0))
    tensor.no_decay = True
    np.testing.assert_array_equal(read(saved({"x": tensor}))["x"], [0, 1, 2, 3])


def test_whole_model_is_refused(saved):
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        read(saved(torch.nn.Linear(2, 2)))


def test_sparse_and_quantised_are_refused(saved):
    with pytest.raises(UserError, match="refused"):
        read(saved({"x": torch.eye(3).to_sparse()}))


def test_torchscript_is_refused(tmp_path):
    with pytest.warns(Warning):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "x.pt"))
    with pytest.raises(UserError, match="TorchScript"):
        read(tmp_path / "x.pt")
