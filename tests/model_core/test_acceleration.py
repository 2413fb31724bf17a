"""Compiled functions and half precision: the same pictures, refused where they are not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_core.acceleration import CODE, Accelerated, Accelerator, code_beside
from model_core.batch import SampleBatch
from model_core.bundle import Bundle, BundleError, Store
from model_core.compilation import AccelerationError, Compiler, compiled_folder
from model_core.denoiser import SampleSpec
from model_core.hardware import choose_dtype
from model_core.samplers import Sampler
from model_core.sampling import sample
from model_core.selfcheck import LIMITS, check, errors, reference
from model_core.weights import load
from tests.models import publish, tiny_config

CPU = torch.device("cpu")
HALF = choose_dtype("auto", CPU)
MIXED = [
    SampleSpec(1, respacing="ddim10", sampler=Sampler.DDIM, guidance_scale=2.0, label=3),
    SampleSpec(2, respacing="10", sampler=Sampler.DDPM, guidance_scale=2.0, label=4),
    SampleSpec(3, respacing="ddim10", sampler=Sampler.DDIM, eta=0.5, label=5),
    SampleSpec(4, respacing="stride10", sampler=Sampler.DPMPP_2M, guidance_scale=2.0, guidance_every=2, label=6),
    SampleSpec(5, respacing="10", sampler=Sampler.DDPM, guidance_scale=1.0, guidance_interval=(0, 500), label=7),
]


@pytest.fixture
def tiny(tmp_path: Path) -> Bundle:
    return publish(tmp_path / "models", "tiny", tiny_config())


def changed(bundle: Bundle, change: dict[str, float]) -> Bundle:
    """A new version of a model, some of its UNet's weights multiplied."""
    store = Store(bundle.path.parent.parent)
    with store.staging(bundle.name) as staged:
        for path in bundle.path.iterdir():
            shutil.copy2(path, staged)
        state = load_file(staged / "unet.safetensors")
        save_file({name: tensor * change.get(name, 1.0) for name, tensor in state.items()}, staged / "unet.safetensors")
        config = json.loads((staged / "config.json").read_text())
        (staged / "config.json").write_text(json.dumps({**config, "weights": {}}))
        return store.publish(bundle.name, staged)


@pytest.fixture
def served(tiny: Bundle, code_for_tiny: Path) -> Accelerated:
    """The model with compiled functions."""
    model = Accelerator(CPU, HALF, code_for_tiny).load(tiny)
    assert model.compiled
    return model


def test_compiled_functions_are_those_of_the_networks(served: Accelerated) -> None:
    assert served.dtype == HALF
    assert set(served.errors) == {"predict", "gradient"}
    assert all(0 < error < LIMITS[name] / 2 for name, error in served.errors.items())


@pytest.mark.parametrize("count", [1, 3, 5])
def test_compiled_code_is_for_any_batch(served: Accelerated, count: int) -> None:
    ours, theirs = sample(served.denoiser, MIXED[:count]), sample(load(served.bundle, CPU, HALF), MIXED[:count])
    assert errors({"x": ours}, {"x": theirs})["x"] < 0.05


def test_updates_are_compiled_exactly(served: Accelerated) -> None:
    # What the update reads besides the networks' outputs is float32, so it has nothing to round.
    eager, ours = (SampleBatch(load(served.bundle, CPU, torch.float32), MIXED) for _ in range(2))
    ours.denoiser.functions.update = served.denoiser.functions.update  # type: ignore[method-assign]
    for _ in range(4):
        eager.step(), ours.step()
    torch.testing.assert_close(ours.x, eager.x, rtol=1e-4, atol=1e-4)


def test_code_takes_the_weights_of_any_version(tiny: Bundle, code_for_tiny: Path) -> None:
    other = changed(tiny, {"out.2.bias": 40.0, "input_blocks.0.0.weight": 1.3, "out.2.weight": 0.5})
    model = Accelerator(CPU, HALF, code_for_tiny).load(other)
    assert model.compiled
    assert model.errors["predict"] < LIMITS["predict"] / 2


def test_what_half_precision_cannot_hold_is_served_in_float32(tiny: Bundle, tmp_path: Path) -> None:
    large = changed(tiny, {"input_blocks.0.0.weight": 1e7})  # float16 ends at 65504
    model = Accelerator(CPU, torch.float16, tmp_path / "cache").load(large)
    assert model.dtype == torch.float32
    assert model.refused == ["dtype"]
    assert sample(model.denoiser, MIXED[:1]).isfinite().all()


def test_code_that_computes_something_else_is_not_used(tiny: Bundle, tmp_path: Path, code_for_tiny: Path) -> None:
    accelerator = Accelerator(CPU, HALF, tmp_path / "cache")
    honest = accelerator.load(tiny)
    folder = compiled_folder(tmp_path / "cache" / CODE, honest.target)
    shutil.copytree(compiled_folder(code_for_tiny / CODE, honest.target), folder)
    names = json.loads((folder / "weights.json").read_text())
    norm = re.compile(r"unet\.input_blocks\.1\.0\.out_layers\.0\.(weight|bias)")
    first, second = (key for key, name in names["predict"].items() if norm.fullmatch(name))
    names["predict"][first], names["predict"][second] = names["predict"][second], names["predict"][first]
    (folder / "weights.json").write_text(json.dumps(names))
    model = accelerator.load(tiny)
    assert not model.compiled
    assert model.refused == ["code"]
    assert model.errors == honest.errors


def test_damaged_caches_are_made_anew(tiny: Bundle, tmp_path: Path, code_for_tiny: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(code_for_tiny / CODE, cache / CODE)
    before = Accelerator(CPU, HALF, cache).load(tiny)
    assert before.compiled
    for file in cache.glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    (code,) = (cache / CODE).glob("*/")
    (code / "predict.pt2").write_bytes(b"damaged")
    after = Accelerator(CPU, HALF, cache).load(tiny)
    assert not after.compiled
    assert not code.exists()  # else it would not be compiled again
    assert after.errors["gradient"] < LIMITS["gradient"] / 2
    assert len(list(cache.glob("*/*.safetensors"))) == 3  # answers, and weights of two networks


def test_a_model_is_served_where_nothing_can_be_cached(tiny: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert Accelerator(CPU, HALF, tmp_path / "file" / "cache").load(tiny).dtype == HALF


def test_answers_are_those_of_the_configuration(tiny: Bundle, tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    shutil.copytree(tiny.path, tmp_path / "staged")
    config = json.loads((tmp_path / "staged" / "config.json").read_text())
    config["unet"]["num_heads"] = 2
    (tmp_path / "staged" / "config.json").write_text(json.dumps(config))
    other = store.publish("tiny", tmp_path / "staged")
    first, second = (reference(bundle, CPU, tmp_path / "cache")["predict"] for bundle in (tiny, other))
    assert not torch.equal(first, second)


def test_a_wrong_answer_is_told_by_function(tiny: Bundle, tmp_path: Path) -> None:
    expected = reference(tiny, CPU, tmp_path)
    denoiser = load(tiny, CPU, torch.float32)
    assert check(denoiser, denoiser.functions, expected)["predict"] < 1e-5
    with pytest.raises(AccelerationError, match=r"gradient: differs from float32 by 33.33%; accepted are 0.10%"):
        check(denoiser, denoiser.functions, {**expected, "gradient": expected["gradient"] * 1.5})
    assert errors({"a": torch.full((2,), torch.nan)}, {"a": torch.ones(2)})["a"] != 0


def test_code_beside_the_model_is_found(tiny: Bundle, tmp_path: Path, code_for_tiny: Path) -> None:
    shutil.copytree(code_for_tiny / CODE, code_beside(tiny))
    assert Accelerator(CPU, HALF, tmp_path / "cache").load(tiny).compiled
    assert Store(tmp_path / "models").versions("tiny") == ["1"]


def test_without_a_compiler_the_reason_is_told(tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(CPU, HALF, tmp_path / "cache")
    model = accelerator.load(tiny)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(AccelerationError, match="no C\\+\\+ compiler"):
        accelerator.compile(model)


def test_closing_ends_what_is_being_compiled(tiny: Bundle, tmp_path: Path) -> None:
    model = Accelerator(CPU, HALF, tmp_path / "cache").load(tiny)
    compiler = Compiler()
    compiler.close()
    with pytest.raises(AccelerationError, match="ended with -9"):
        compiler.compile(tmp_path / "code", model.target)


MAPPED = """
import re, sys
from pathlib import Path
import torch
from model_core.bundle import open_bundle
from model_core.sampling import sample
from model_core.denoiser import SampleSpec
from model_core.weights import load

denoiser = load(open_bundle(Path(sys.argv[1])), "cpu", torch.bfloat16, Path(sys.argv[2]))
sample(denoiser, [SampleSpec(label=1, respacing="2", guidance_scale=1.0)])
own = shared = 0
for entry in re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
    if sys.argv[2] in entry.splitlines()[0]:
        own += int(re.search(r"Anonymous: +(\\d+)", entry)[1])
        shared += int(re.search(r"Rss: +(\\d+)", entry)[1])
print(own, shared)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_map_one_copy_of_the_weights(tiny: Bundle, tmp_path: Path) -> None:
    cache = tmp_path / "weights"
    command = [sys.executable, "-c", MAPPED, str(tiny.path), str(cache)]
    for _ in range(2):
        own, mapped = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        assert own == 0
        assert mapped > 0.9 * sum(path.stat().st_size for path in cache.iterdir()) / 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_weights_are_the_loaded_ones(tiny: Bundle, tmp_path: Path, dtype: torch.dtype) -> None:
    loaded, mapped = load(tiny, CPU, dtype), load(tiny, CPU, dtype, tmp_path / "weights")
    for ours, theirs in ((mapped.unet, loaded.unet), (mapped.classifier, loaded.classifier)):
        assert ours is not None
        assert theirs is not None
        for name, tensor in theirs.state_dict().items():
            other = ours.state_dict()[name]
            assert (other.dtype, other.stride()) == (tensor.dtype, tensor.stride())
            assert torch.equal(other, tensor)
    tiny.weights_path("unet").write_bytes(b"damaged")
    with pytest.raises(BundleError, match="not a whole safetensors file"):
        load(tiny, CPU, dtype, tmp_path / "weights")


def test_half_precision_pictures_of_the_shipped_model() -> None:
    bundle = Store(Path("models")).find("emoji32")
    specs = [SampleSpec(i, respacing="ddim25", sampler=Sampler.DDIM, guidance_scale=4.0, label=i) for i in range(6)]
    exact, half = (
        sample(load(bundle, CPU, dtype), specs, batch_size=6).clamp(-1, 1) for dtype in (torch.float32, HALF)
    )
    mse = ((exact - half) / 2).square().flatten(1).mean(1).clamp(min=1e-12)
    assert np.mean((-10 * mse.log10()).numpy()) > 30
