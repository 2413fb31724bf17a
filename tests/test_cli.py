"""The ``guided`` command as users run it: what it says, its files, its exit code."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from clients.cli import main
from model_core.unet import build_unet
from tests.golden_files import with_weights
from tests.model_core.test_bundle import UNET_FLAGS
from tests.models import publish, tiny_config, upsampler_config


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    publish(root, "tiny", tiny_config())
    publish(root, "up", upsampler_config())
    return root


def guided(*arguments: object, models: Path, code: int = 0) -> str:
    """Run the command (in this process, which has torch already); its output, or its errors if it should fail."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["guided", *map(str, arguments), "--models-dir", str(models)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == code, errors.getvalue()
    return errors.getvalue() if code else out.getvalue()


def test_npz_has_the_published_layout(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    guided("sample", "tiny", "--classes", "class 3,7,0-2", "--steps", 2, "--out", out, models=models)
    with np.load(out) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].shape == (5, 16, 16, 3)
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [3, 7, 0, 1, 2]


def test_png_grid_and_seeds(models: Path, tmp_path: Path) -> None:
    arguments = ["sample", "tiny", "--classes", "all", "--sampler", "ddim", "--steps", 2, "--out"]
    for name, seed, batch in (("a", 1, 8), ("b", 1, 3), ("c", 2, 8)):
        guided(*arguments, tmp_path / f"{name}.png", "--seed", seed, "--batch-size", batch, models=models)
    a, b, c = (np.asarray(Image.open(tmp_path / f"{n}.png")).astype(int) for n in "abc")
    assert a.shape == (3 * 16, 4 * 16, 3)
    assert np.abs(a - b).max() <= 1
    assert np.abs(a - c).max() > 10


def test_every_sampling_option_changes_the_picture(models: Path, tmp_path: Path) -> None:
    def pixels(*options: object) -> NDArray[np.int64]:
        out = tmp_path / "x.npz"
        guided("sample", "tiny", "--classes", "3", "--respacing", "4", "--out", out, *options, models=models)
        with np.load(out) as file:
            return np.asarray(file["arr_0"], dtype=np.int64)

    base = pixels()
    ddim = pixels("--sampler", "ddim")
    assert (base != ddim).any()
    assert (ddim != pixels("--sampler", "ddim", "--eta", "0.7")).any()
    assert (base != pixels("--scale", "60")).any()
    assert (pixels("--scale", "60") != pixels("--scale", "60", "--guidance-interval", 900, 999)).any()
    assert (pixels("--scale", "60") != pixels("--scale", "60", "--guidance-every", 2)).any()
    assert (ddim != pixels("--sampler", "dpmpp_2m")).any()
    assert (base != pixels("--no-clip")).any()


def test_compile_tells_the_error_against_float32(models: Path, code_for_tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "models")
    shutil.copytree(code_for_tiny / "compiled", tmp_path / "models" / "tiny" / "compiled")  # compiled before
    said = guided("models", "compile", "tiny", models=tmp_path / "models")
    assert re.search(
        r"tiny/compiled: code for cpu in \w+; differs from float32 by: predict [0-9.]+%, gradient [0-9.]+%", said
    )
    assert len(list((tmp_path / "models" / "tiny" / "compiled").glob("*/target.json"))) == 1


def test_cascade_equals_its_stages(models: Path, tmp_path: Path) -> None:
    one, base, two = tmp_path / "one.npz", tmp_path / "base.npz", tmp_path / "two.npz"
    guided("sample", "tiny", "--classes", "4,5", "--steps", 3, "--upsample", "up", "--out", one, models=models)
    guided("sample", "tiny", "--classes", "4,5", "--steps", 3, "--out", base, models=models)
    guided("sample", "up", "--input", base, "--out", two, models=models)
    with np.load(one) as cascade, np.load(two) as stages:
        assert cascade["arr_0"].shape == (2, 32, 32, 3)
        assert cascade["arr_1"].tolist() == stages["arr_1"].tolist() == [4, 5]
        assert np.abs(cascade["arr_0"].astype(int) - stages["arr_0"]).max() <= 1


def test_upsampling_a_png(models: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 16), "red").save(tmp_path / "in.png")  # two cells of 16x16
    guided("sample", "up", "--input", tmp_path / "in.png", "--classes", 1, "--out", tmp_path / "out.npz", models=models)
    with np.load(tmp_path / "out.npz") as file:
        assert file["arr_0"].shape == (2, 32, 32, 3)
        assert file["arr_1"].tolist() == [1, 1]


def test_json(models: Path, tmp_path: Path) -> None:
    make = ["sample", "tiny", "--steps", 2, "--seed", 5, "--upsample", "up", "--json", "--out", tmp_path / "a.png"]
    told = json.loads(guided(*make, models=models))
    assert told == {"out": f"{tmp_path}/a.png", "models": ["tiny@1", "up@1"], "seed": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "model 'absent': not found"),
        (["tiny", "--classes", "dog"], "classes: 'dog' is no class of this model (0 to 9; known: class 0"),
        (["tiny", "--classes", "10"], "classes: 10 is not within 0 to 9"),
        (["tiny", "--steps", "2000"], "steps: 2000 is not between 1 and 1000"),
        (["tiny", "--steps", "2", "--respacing", "3"], "steps: give --steps or --respacing"),
        (["tiny", "--sampler", "euler"], "sampler: 'euler' is not one of ddpm, ddim"),
        (["tiny", "--eta", "2"], "eta: 2.0 is not between 0 and 1"),
        (["tiny", "--out", "x.jpg"], "out: x.jpg must end in .png or .npz"),
        (["tiny", "--dtype", "int8"], "dtype: 'int8' is not one of float32"),
        (["tiny", "--device", "abacus"], "device: 'abacus' is not a device"),
        (["tiny", "--upsample", "tiny"], "upsample: that model is not an upsampler"),
        (["tiny", "--input", "x.npz"], "input: pictures to upsample are needed exactly when"),
        (["up"], "input: pictures to upsample are needed exactly when"),
        (["up", "--input", "absent.npz"], "input: absent.npz does not exist"),
        (["up", "--input", __file__], "is not a readable image"),
        (["up", "--scale", "2", "--input", "IN"], "guidance_scale: this model has no classifier"),
        (["../tiny"], "../tiny: not a bundle"),
        (["tiny", "--guidance-interval", "9", "1"], "guidance_interval: (9, 1) ends before it begins"),
    ],
)
def test_errors_are_one_line_and_name_the_option(
    models: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "in.png")
    given = [str(tmp_path / "in.png") if a == "IN" else a for a in arguments]
    out = [] if "--out" in given else ["--out", tmp_path / "never.png"]
    error = guided("sample", *given, *out, models=models, code=2)
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "never.png").exists()


def test_models_verbs(models: Path, tmp_path: Path) -> None:
    torch.save(with_weights(build_unet(tiny_config().unet)).state_dict(), tmp_path / "m.pt")
    names = tmp_path / "names.txt"
    names.write_text("".join(f"n{i}\n" for i in range(10)))
    root = tmp_path / "models"
    imported = ["models", "import", "new", "--unet", tmp_path / "m.pt", "--flags", UNET_FLAGS, "--class-names", names]
    assert guided(*imported, models=root) == "published new@1\n"
    assert guided("models", "publish", models / "tiny" / "1", "new", models=root) == "published new@2\n"
    (row,) = json.loads(guided("models", "list", "--json", models=root))
    assert (row["name"], row["latest"], row["versions"], row["num_classes"]) == ("new", "2", ["1", "2"], 10)
    assert "new" in guided("models", "list", models=root)
    assert json.loads(guided("models", "show", "new@1", models=root))["class_names"][9] == "n9"
    assert "whole" in guided("models", "verify", "new", models=root)
    told = json.loads(guided("models", "verify", "new", "--json", models=root))
    assert (told["name"], told["version"], told["path"]) == ("new", "2", str(root / "new" / "2"))
    again = ["models", "publish", models / "tiny" / "1", "new", "--json"]
    assert json.loads(guided(*again, models=root))["version"] == "3"
    rolled = json.loads(guided("models", "rollback", "new", "--json", models=root))
    assert rolled == {"name": "new", "version": "2", "was": "3"}
    (root / "new" / "2" / "unet.safetensors").write_bytes(b"")
    assert "expected" in guided("models", "verify", "new", models=root, code=2)
    wrong = ["models", "import", "bad", "--unet", tmp_path / "m.pt", "--flags", "--num_channels 100"]
    error = guided(*wrong, models=root, code=2)
    assert error.startswith("guided: channel_mult: level 0 has 100 channels")
    assert error.count("\n") == 1


def test_importing_clients_and_server_does_not_import_torch() -> None:
    code = "import sys, clients.cli, server, worker, model_core.config, model_core.presets, model_core.schedule; \
            import model_core.bundle; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("verb", [[], ["generate"], ["sample"], ["train"], ["worker"], ["models", "import"]])
def test_help_imports_nothing_heavy(verb: list[str]) -> None:
    code = f"""
import sys
from clients.cli import app
app([*{verb}, "--help"], standalone_mode=False)
heavy = {{"torch", "numpy", "httpx", "fastapi", "redis", "PIL", "server.schemas"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout


def test_version() -> None:
    done = subprocess.run([sys.executable, "-m", "clients", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"guided-sampling-server {version('guided-sampling-server')}\n"
