"""The 64x64 preset with random weights: loading costs little more than the weights, and a step runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model_core.bundle import BundleConfig, SamplingDefaults, Store, write_config
from model_core.flags import classifier_config, diffusion_config, parse_flags, unet_config
from model_core.presets import preset
from model_core.weights import build, expected_shapes

MEASURE = """
import json, sys
from pathlib import Path
import torch
from model_core.bundle import open_bundle
from model_core.batch import SampleBatch
from model_core.denoiser import SampleSpec
from model_core.weights import load

def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

before = memory("VmRSS")
denoiser = load(open_bundle(Path(sys.argv[1])))
peak = memory("VmHWM") - before
weights = sum(p.numel() * 4 for m in (denoiser.unet, denoiser.classifier) for p in m.parameters())
batch = SampleBatch(denoiser, [SampleSpec(label=7, guidance_scale=1.0, respacing="250")])
finite = bool(batch.step().x.isfinite().all())
print(json.dumps({"peak": peak, "weights": weights, "finite": finite}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_loading_the_64x64_model(tmp_path: Path) -> None:
    flags = parse_flags(preset("64x64_diffusion").flags)
    config = BundleConfig(
        unet=unet_config(flags),
        classifier=classifier_config(parse_flags(preset("64x64_classifier").flags)),
        diffusion=diffusion_config(flags),
        defaults=SamplingDefaults(guidance_scale=1.0),
    )
    with Store(tmp_path).staging("adm64") as staged:
        assert config.classifier is not None
        for part, network in (("unet", config.unet), ("classifier", config.classifier)):
            shapes = expected_shapes(build(network))
            save_file(
                {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}, staged / f"{part}.safetensors"
            )
        write_config(staged, config)
        out = subprocess.run([sys.executable, "-c", MEASURE, str(staged)], check=True, capture_output=True, text=True)
    measured = json.loads(out.stdout)
    print(measured, "ratio", measured["peak"] / measured["weights"])
    assert measured["weights"] == 4 * (295_904_454 + 65_438_568)
    assert measured["peak"] <= 1.2 * measured["weights"]
    assert measured["finite"]
