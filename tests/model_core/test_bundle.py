"""Bundles: what is published is whole or absent, and damage is named."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_core.bundle import Bundle, BundleConfig, BundleError, Store, open_bundle
from model_core.config import DiffusionConfig
from model_core.denoiser import SampleSpec
from model_core.importing import Checkpoint, import_checkpoints
from model_core.sampling import sample
from model_core.unet import build_unet
from model_core.weights import load, read_checkpoint, verify
from tests.golden_files import with_weights
from tests.models import publish, tiny_config, tiny_denoiser, write_weights

UNET_FLAGS = (
    "--image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --attention_resolutions 8 "
    "--num_heads 1 --class_cond True --num_classes 10 --learn_sigma True --resblock_updown True"
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return publish(tmp_path / "models", "tiny", tiny_config())


def checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Write a published-style checkpoint of the tiny model; returns its weights."""
    state = with_weights(build_unet(tiny_config().unet)).state_dict()
    torch.save(state, path)
    return state


def test_round_trip(bundle: Bundle) -> None:
    spec = SampleSpec(3, 0, respacing="3", label=2, guidance_scale=4.0)
    assert torch.equal(sample(load(bundle), [spec]), sample(tiny_denoiser(), [spec]))
    verify(bundle)


def test_half_precision_weights_and_torso(tmp_path: Path) -> None:
    half = publish(tmp_path, "half", tiny_config(), torch.float16)
    assert (
        half.weights_path("unet").stat().st_size
        < 0.6 * publish(tmp_path, "full", tiny_config()).weights_path("unet").stat().st_size
    )
    spec = SampleSpec(3, 0, respacing="ddim5", label=2, guidance_scale=4.0)
    full = sample(load(half), [spec])
    denoiser = load(half, dtype=torch.bfloat16)
    assert denoiser.unet.torso_dtype == torch.bfloat16
    assert denoiser.unet.out[0].weight.dtype == torch.float32
    assert (sample(denoiser, [spec]) - full).abs().mean() < 0.05


def test_versions_and_latest(tmp_path: Path) -> None:
    first, second = (publish(tmp_path, "tiny", tiny_config()) for _ in range(2))
    store = Store(tmp_path)
    assert (first.version, second.version) == ("1", "2")
    assert store.names() == ["tiny"]
    assert store.find("tiny").version == "2"
    assert store.find("tiny@1").version == "1"
    store.set_latest("tiny", "1")
    assert store.find("tiny").version == "1"
    assert publish(tmp_path, "tiny", tiny_config()).version == "3"


@pytest.mark.parametrize(
    "reference", ["../tiny", "tiny/1", "Tiny", "", "tiny@../1", "tiny@9", "tiny@", "absent", ".tiny"]
)
def test_bad_references_are_refused(bundle: Bundle, reference: str) -> None:
    with pytest.raises(BundleError, match="model"):
        Store(bundle.path.parent.parent).find(reference)


def test_rollback_moves_latest_and_keeps_the_versions(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(3):
        publish(tmp_path, "toy", tiny_config())
    assert store.rollback("toy") == ("3", "2")
    assert store.find("toy").version == "2"
    assert store.rollback("toy", "3") == ("2", "3")
    assert store.rollback("toy", "1") == ("3", "1")
    assert store.versions("toy") == ["1", "2", "3"]
    with pytest.raises(BundleError, match="no version before 1"):
        store.rollback("toy")
    with pytest.raises(BundleError, match="no version '9'"):
        store.rollback("toy", "9")
    assert publish(tmp_path, "toy", tiny_config()).version == "4"


def test_failed_publication_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "models")

    def publish_half() -> None:
        with store.staging("tiny") as staged:
            (staged / "unet.safetensors").write_bytes(b"half a file")
            store.publish("tiny", staged)

    with pytest.raises(BundleError, match="not a bundle"):
        publish_half()
    assert not (tmp_path / "models").exists()


def test_interrupted_writer_is_invisible(bundle: Bundle) -> None:
    """What a killed publisher leaves is not a version, and hinders nobody."""
    root = bundle.path.parent.parent
    left = bundle.path.parent / ".staging-dead"
    left.mkdir()
    (left / "unet.safetensors").write_bytes(b"half")
    assert Store(root).versions("tiny") == ["1"]
    assert publish(root, "tiny", tiny_config()).version == "2"


def test_publishers_at_once_get_different_versions(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_weights(source, tiny_config())
    command = [sys.executable, "-m", "clients", "models", "publish", str(source), "tiny"]
    running = [subprocess.Popen([*command, "--models-dir", str(tmp_path / "models")]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert Store(tmp_path / "models").versions("tiny") == ["1", "2", "3"]


def edit_weights(bundle: Bundle, **changes: torch.Tensor | None) -> None:
    path = bundle.weights_path("unet")
    state = {**load_file(path), **{key.replace("__", "."): value for key, value in changes.items()}}
    save_file({key: value for key, value in state.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_embed__0__weight": None}, r"time_embed\.0\.weight is missing; expected shape \[128, 32\]"),
        ({"extra": torch.zeros(1)}, r"extra is not a weight of this network"),
        ({"out__2__bias": torch.zeros(7)}, r"out\.2\.bias has shape \[7\]; expected \[6\]"),
        ({"out__2__bias": torch.zeros(6, dtype=torch.int32)}, r"out\.2\.bias has type I32; expected one of .*float32"),
    ],
)
def test_wrong_weights_are_named(bundle: Bundle, changes: dict[str, Any], message: str) -> None:
    edit_weights(bundle, **changes)
    with pytest.raises(BundleError, match=message):
        load(bundle)


def test_truncated_weights(bundle: Bundle) -> None:
    path = bundle.weights_path("classifier")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"classifier\.safetensors: not a whole safetensors file"):
        load(bundle)
    with pytest.raises(BundleError, match="bytes; expected"):
        verify(bundle)


def test_verify_sees_a_changed_byte(bundle: Bundle) -> None:
    path = bundle.weights_path("unet")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        verify(bundle)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["unet"].pop("model_channels"), "unet.*model_channels"),
        (lambda c: c["unet"].update(surprise=1), "surprise"),
        (lambda c: c["unet"].update(out_channels=3), "out_channels: variance 'learned_range' needs 6"),
        (lambda c: c["classifier"].update(image_size=32), "classifier.image_size: 32 differs from the UNet's 16"),
        (lambda c: c["classifier"].update(out_channels=9), "classifier.out_channels: 9 classes"),
        (lambda c: c.update(class_names=["one"]), "class_names: 1 names for 10 classes"),
        (lambda c: c["defaults"].update(respacing="ddim999"), "defaults.respacing"),
        (lambda c: c.update(classifier=None), "defaults.guidance_scale"),
    ],
)
def test_bad_configuration_names_the_field(bundle: Bundle, edit: Any, message: str) -> None:
    file = bundle.path / "config.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle.path)


def test_missing_weights_file(bundle: Bundle) -> None:
    bundle.weights_path("classifier").unlink()
    with pytest.raises(BundleError, match=r"classifier\.safetensors is missing"):
        open_bundle(bundle.path)


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("legacy", [True, False])
def test_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    mark, file = tmp_path / "it ran", tmp_path / "64x64_diffusion.pt"
    torch.save({"time_embed.0.weight": Hostile(mark)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BundleError, match="refused"):
        import_checkpoints(Store(tmp_path / "models"), "evil", Checkpoint(file))
    assert not mark.exists()
    assert not (tmp_path / "models").exists()


def test_plain_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark, file = tmp_path / "it ran", tmp_path / "model.pt"
    file.write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(BundleError):
        read_checkpoint(file)
    assert not mark.exists()
    pickle.loads(file.read_bytes())  # the file is as dangerous as meant
    assert mark.exists()


@pytest.mark.parametrize("legacy", [True, False])
def test_import_by_flags(tmp_path: Path, legacy: bool) -> None:
    state = with_weights(build_unet(tiny_config().unet)).state_dict()
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    bundle = import_checkpoints(Store(tmp_path / "models"), "tiny", Checkpoint(tmp_path / "model.pt", flags=UNET_FLAGS))
    assert bundle.config.unet == tiny_config().unet
    assert bundle.config.diffusion == DiffusionConfig()
    loaded = load(bundle).unet.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    verify(bundle)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("label_emb.weight"), r"label_emb\.weight is missing; expected shape \[10, 128\]"),
        (lambda s: s.update(more=torch.zeros(1)), "more is not a weight"),
        (lambda s: s.update({"out.0.bias": torch.zeros(3)}), r"out\.0\.bias has shape \[3\]; expected \[32\]"),
        (lambda s: s.update({"out.0.bias": torch.zeros(32).long()}), r"out\.0\.bias has type torch\.int64"),
        (lambda s: s.update({"out.0.bias": "text"}), r"out\.0\.bias is not a tensor"),
    ],
)
def test_unfit_checkpoint_names_the_weight_and_leaves_nothing(tmp_path: Path, damage: Any, message: str) -> None:
    state: dict[str, Any] = dict(checkpoint(tmp_path / "model.pt"))
    damage(state)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(BundleError, match=message):
        import_checkpoints(Store(tmp_path / "models"), "tiny", Checkpoint(tmp_path / "model.pt", flags=UNET_FLAGS))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"no pickle"])
def test_damaged_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.pt"):
        read_checkpoint(tmp_path / "model.pt")


def test_truncated_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match=r"model\.pt"):
        read_checkpoint(tmp_path / "model.pt")


def test_preset_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="64x64_classifier is a classifier"):
        import_checkpoints(Store(tmp_path), "x", Checkpoint(tmp_path / "64x64_classifier.pt"))


def test_published_bundle_survives_copying(bundle: Bundle, tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(bundle.path, copied)
    verify(open_bundle(copied))


def test_config_round_trips_through_json() -> None:
    config = tiny_config()
    assert BundleConfig.model_validate_json(config.model_dump_json()) == config
