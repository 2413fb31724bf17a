from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model_core.acceleration import CODE
from model_core.bundle import BundleError, exclusive
from model_core.denoiser import SampleSpec
from model_core.hardware import choose_device, choose_dtype
from model_core.sampling import sample
from model_core.weights import load
from tests.models import publish, tiny_config
from tests.stack import eventually
from worker.engine import Engine, Finished, Request, Stage
from worker.registry import Loaded, Registry, next_bucket
from worker.settings import WorkerSettings


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(lambda event: None)
    thread = threading.Thread(target=engine.run)
    thread.start()
    yield engine
    engine.stop()
    thread.join()


def settings(tmp_path: Path, **given: object) -> WorkerSettings:
    base = {
        "models_dir": tmp_path / "models",
        "data_dir": tmp_path,
        "dtype": "float32",
        "device": "cpu",
        "width": 2,
        "compile": False,
    }
    return WorkerSettings.model_validate({**base, **given})


def lanes(engine: Engine) -> set[str]:
    time.sleep(0.3)  # orders are obeyed between steps
    return set(engine.widths())


def test_all_diffusion_models_are_served_and_none_is_an_error(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(BundleError, match="no diffusion model that can be loaded"):
        Registry(engine, settings(tmp_path)).serve()
    for name in ("a", "b"):
        publish(tmp_path / "models", name, tiny_config())
    registry = Registry(engine, settings(tmp_path))
    registry.serve()
    assert registry.names == ["a", "b"]
    assert lanes(engine) == {"a@1", "b@1"}
    with pytest.raises(BundleError, match="no version '3'"):
        registry.get("a", "3").result()


def test_under_a_memory_limit_unused_models_make_room(tmp_path: Path, engine: Engine) -> None:
    for name in ("a", "b"):
        publish(tmp_path / "models", name, tiny_config())
    size = sum(p.stat().st_size for p in (tmp_path / "models" / "a" / "1").glob("*.safetensors"))
    registry = Registry(engine, settings(tmp_path, models=["a"], memory_limit_mb=(size * 3 // 2 >> 20) + 1))
    registry.serve()
    registry.get("b", "1").result()
    assert lanes(engine) == {"b@1"}
    registry.get("a", "1").result()
    assert lanes(engine) == {"a@1"}


def test_compiled_functions_take_over_while_samples_run(
    tmp_path: Path, served_models: Path, code_for_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.registry.PATIENCE_S", 0.0)  # samples run all the time
    compiled, finished = threading.Event(), list[Finished]()

    def on_loaded(loaded: Loaded) -> None:
        if loaded.model.compiled:
            compiled.set()

    engine = Engine(lambda event: finished.append(event) if isinstance(event, Finished) else None)
    given = settings(tmp_path, models_dir=served_models, models=["tiny"], dtype="auto", compile=True)
    registry = Registry(engine, given, on_loaded)
    (code,) = (code_for_tiny / CODE).glob("*/")
    here = given.acceleration_folder / CODE
    here.mkdir(parents=True)
    (lock := here / f"{code.name}.lock").touch()
    with exclusive(lock):  # as if the compiling process were at work
        registry.serve()
        engine.step()  # adds the lane
        (loaded,) = registry.loaded
        eager = loaded.model.denoiser.functions
        spec = SampleSpec(seed=1, respacing="20", label=3, guidance_scale=2.0)
        engine.submit(Request("before and after", [(Stage(loaded.key, spec, 20),)]))
        for _ in range(10):
            engine.step()
        assert loaded.model.denoiser.functions is eager
        Path(shutil.copytree(code, here / "made")).rename(here / code.name)
    assert compiled.wait(60)
    while not finished:
        engine.step()
    assert loaded.model.denoiser.functions is not eager
    assert loaded.compile_seconds is not None
    (alone,) = sample(load(loaded.bundle, dtype=loaded.model.dtype), [spec])
    assert (finished[0].x - alone).abs().mean() < 0.01
    registry.close()

    again = Registry(engine, given)
    assert again.get("tiny", "1").result().model.compiled


def test_a_model_larger_than_the_limit_is_refused(tmp_path: Path, engine: Engine) -> None:
    publish(tmp_path / "models", "a", tiny_config())
    with pytest.raises(BundleError, match=r"memory_limit_mb: .* do not fit"):
        Registry(engine, settings(tmp_path, models=["a"], memory_limit_mb=1)).serve()


def test_a_damaged_model_does_not_keep_the_others_from_being_served(tmp_path: Path, engine: Engine) -> None:
    for name in ("a", "b"):
        bundle = publish(tmp_path / "models", name, tiny_config())
    bundle.weights_path("unet").write_bytes(b"damaged")
    registry = Registry(engine, settings(tmp_path))
    registry.serve()
    assert registry.names == ["a"]


def test_a_damaged_new_version_is_not_taken_up(
    tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path / "models", "a", tiny_config())
    registry = Registry(engine, settings(tmp_path))
    registry.serve()
    bundle = publish(tmp_path / "models", "a", tiny_config())
    bundle.weights_path("unet").write_bytes(b"damaged")
    caplog.set_level("ERROR")

    def refused() -> bool:
        registry.poll()
        return "model a@2: not taken up" in caplog.text

    eventually(refused, what="the refusal")
    registry.poll()
    assert caplog.text.count("model a@2") == 1
    assert registry.current("a") == "1"
    assert lanes(engine) == {"a@1"}


def test_the_measured_width_is_remembered(tmp_path: Path, engine: Engine) -> None:
    publish(tmp_path / "models", "a", tiny_config())
    given = settings(tmp_path, width=None, max_width=4)
    Registry(engine, given).serve()
    (key, width) = next(iter(json.loads((tmp_path / "widths.json").read_text()).items()))
    assert width in (1, 2, 4)
    (tmp_path / "widths.json").write_text(f'{{"{key}": 3}}')
    Registry(engine, given).serve()
    assert lanes(engine) == {"a@1"}
    assert engine.widths() == {"a@1": 3}


def test_devices_and_types() -> None:
    with pytest.raises(ValueError, match="device: 'abacus' is not a device"):
        choose_device("abacus")
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16
    assert choose_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)
    assert choose_dtype("float32", torch.device("cuda")) == torch.float32


def test_buckets_are_few_and_close() -> None:
    assert [next_bucket(n) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
