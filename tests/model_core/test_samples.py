"""Samples belong to themselves: the batch they run in does not change them."""

from __future__ import annotations

import pytest
import torch

from model_core.batch import SampleBatch
from model_core.config import ClassifierConfig, DiffusionConfig, UNetConfig
from model_core.denoiser import Denoiser, SampleSpec
from model_core.noise import noise_keys, normal, threefry2x32
from model_core.samplers import Sampler
from model_core.sampling import sample
from model_core.seeds import MAX_SEED, random_label
from model_core.unet import UNet
from tests.golden_files import with_weights
from tests.models import tiny_classifier, tiny_denoiser


def mixed_specs() -> list[SampleSpec]:
    """Unlike samples: step counts, samplers, scales, classes, clipping, intervals."""
    return [
        SampleSpec(1, 0, respacing="5", label=3, guidance_scale=10.0),
        SampleSpec(1, 1, respacing="12", label=0),
        SampleSpec(2, 0, respacing="ddim10", sampler=Sampler.DDIM, label=7, guidance_scale=40.0),
        SampleSpec(3, 5, respacing="4,2,1", sampler=Sampler.DDIM, eta=0.6, label=9, clip_denoised=False),
        SampleSpec(4, 0, respacing="7", label=2, guidance_scale=20.0, guidance_interval=(300, 700)),
        SampleSpec(5, 0, respacing="ddim8", sampler=Sampler.DDIM, label=1, guidance_scale=-5.0, clip_denoised=False),
        SampleSpec(6, 0, respacing="stride6", sampler=Sampler.DPMPP_2M, label=5, guidance_scale=20.0),
        SampleSpec(7, 0, respacing="ddim10", sampler=Sampler.DDIM, label=8, guidance_scale=20.0, guidance_every=3),
    ]


def test_mixed_batch_equals_each_sample_alone() -> None:
    denoiser, specs = tiny_denoiser(), mixed_specs()
    together = sample(denoiser, specs, batch_size=len(specs))
    for i, spec in enumerate(specs):
        alone = sample(denoiser, [spec])
        difference = (together[i] - alone[0]).abs() / alone[0].abs().clamp(min=1)
        assert difference.max() <= 1e-4, spec


def test_batch_size_does_not_change_pictures() -> None:
    denoiser, specs = tiny_denoiser(), mixed_specs()
    torch.testing.assert_close(
        sample(denoiser, specs, batch_size=2), sample(denoiser, specs, batch_size=5), rtol=1e-4, atol=1e-4
    )


def test_one_unet_pass_per_step_and_classifier_only_for_the_guided() -> None:
    denoiser, specs = tiny_denoiser(), mixed_specs()
    unet_widths: list[int] = []
    classifier_widths: list[int] = []
    assert denoiser.classifier is not None
    denoiser.unet.register_forward_pre_hook(lambda _, args: unet_widths.append(len(args[0])))
    denoiser.classifier.register_forward_pre_hook(lambda _, args: classifier_widths.append(len(args[0])))
    batch = SampleBatch(denoiser, specs)
    batch.step()
    assert unet_widths == [8]
    assert classifier_widths == [5]  # sample 4's interval begins below its first timestep, 999


def test_guidance_interval_saves_passes_and_changes_only_inside() -> None:
    denoiser = tiny_denoiser()
    guided = SampleSpec(7, 0, respacing="10", label=4, guidance_scale=30.0)
    outside = SampleSpec(7, 0, respacing="10", label=4, guidance_scale=30.0, guidance_interval=(1, 2))
    unguided = SampleSpec(7, 0, respacing="10", label=4)
    everywhere = SampleSpec(7, 0, respacing="10", label=4, guidance_scale=30.0, guidance_interval=(0, 999))
    assert torch.equal(sample(denoiser, [outside]), sample(denoiser, [unguided]))
    assert torch.equal(sample(denoiser, [everywhere]), sample(denoiser, [guided]))
    assert not torch.equal(sample(denoiser, [guided]), sample(denoiser, [unguided]))


def test_guidance_every_k_steps_saves_passes_and_uses_gradients_again() -> None:
    denoiser = tiny_denoiser()
    passes: list[int] = []
    assert denoiser.classifier is not None
    denoiser.classifier.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    made = {}
    for every in (1, 3, 10):
        passes.clear()
        spec = SampleSpec(
            7, 0, respacing="ddim10", sampler=Sampler.DDIM, label=4, guidance_scale=30.0, guidance_every=every
        )
        made[every] = sample(denoiser, [spec])
        assert len(passes) == -(-10 // every)
    plain = SampleSpec(7, 0, respacing="ddim10", sampler=Sampler.DDIM, label=4, guidance_scale=30.0)
    assert torch.equal(made[1], sample(denoiser, [plain]))
    assert not torch.equal(made[1], made[3])
    assert not torch.equal(made[3], made[10])


def test_guidance_every_counts_from_the_start_of_the_interval() -> None:
    denoiser = tiny_denoiser()
    spec = SampleSpec(1, 0, respacing="10", label=4, guidance_scale=9.0, guidance_interval=(0, 700), guidance_every=2)
    batch = SampleBatch(denoiser, [spec])
    guided = []
    while batch.steps_left[0]:
        guided.append(bool(batch.guided))
        batch.step()
    assert guided == [False, False, False, True, False, True, False, True, False, True]  # 777 is outside, 666 inside


def test_dpmpp_begins_and_ends_as_ddim() -> None:
    denoiser = tiny_denoiser()

    def make(sampler: Sampler, respacing: str) -> torch.Tensor:
        spec = SampleSpec(3, 0, respacing=respacing, sampler=sampler, label=2, clip_denoised=False)
        return sample(denoiser, [spec])

    # Two steps: the first has no step before it, the last is of first order.
    torch.testing.assert_close(make(Sampler.DPMPP_2M, "stride2"), make(Sampler.DDIM, "stride2"), rtol=1e-4, atol=1e-4)
    assert not torch.equal(make(Sampler.DPMPP_2M, "stride3"), make(Sampler.DDIM, "stride3"))


def test_encoding_and_decoding_returns_the_picture() -> None:
    # A network whose eps does not depend on x makes the ODE exactly invertible.
    config = UNetConfig(
        image_size=8, model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=(), channel_mult=(1,)
    )
    network = UNet(config)  # freshly made: its last convolution is zero, so eps = 0
    denoiser = Denoiser(network, None, DiffusionConfig())
    picture = torch.rand(2, 3, 8, 8) * 1.6 - 0.8
    specs = [SampleSpec(respacing="ddim50", sampler=Sampler.DDIM_ENCODE)] * 2
    latent = SampleBatch(denoiser, specs, start=picture)
    for _ in range(49):  # the last encoding step leads to pure noise, whose x_0 is lost
        latent.step()
    table = denoiser.bank.gather(torch.tensor([49]))
    torch.testing.assert_close(latent.x / table.sqrt_alpha_bar, picture, rtol=1e-3, atol=1e-3)


def test_samples_may_leave_at_any_step() -> None:
    denoiser, specs = tiny_denoiser(), mixed_specs()
    whole = sample(denoiser, specs)
    batch = SampleBatch(denoiser, specs)
    batch.step()
    batch = batch.select([3, 0])
    assert len(batch) == 2
    for _ in range(4):
        batch.step()
    assert batch.steps_left == [2, 0]
    torch.testing.assert_close(batch.x[1], whole[0], rtol=1e-4, atol=1e-4)


def test_samples_may_join_at_any_step_and_be_parked() -> None:
    denoiser, specs = tiny_denoiser(), mixed_specs()
    whole = sample(denoiser, specs)
    first, late = SampleBatch(denoiser, specs[:2]), SampleBatch(denoiser, specs[3:4])
    first.step()
    parked = first.select([1])
    together = SampleBatch.join([first.select([0]), late])
    together.step()
    together = SampleBatch.join([parked, together])
    while True:
        going = [i for i, left in enumerate(together.steps_left) if left]
        for i, spec in enumerate(together.specs):
            if i not in going:
                torch.testing.assert_close(together.x[i], whole[specs.index(spec)], rtol=1e-4, atol=1e-4)
        if not going:
            break
        together = together.select(going)
        together.step()


def test_padding_changes_nothing_but_the_shape() -> None:
    denoiser, specs = tiny_denoiser(), mixed_specs()[:3]
    sizes: list[int] = []
    guided: list[int] = []
    denoiser.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    assert denoiser.classifier
    denoiser.classifier.register_forward_pre_hook(lambda _, inputs: guided.append(len(inputs[0])))
    plain, padded = SampleBatch(denoiser, specs), SampleBatch(denoiser, specs)
    plain.step()
    out = padded.step_padded(lambda n: 8 if n == 3 else n)
    assert sizes == [3, 8]
    assert guided[1] == guided[0] < 3  # the copies that fill up the batch are not guided
    assert len(padded) == len(out.pred_x0) == 3
    torch.testing.assert_close(padded.x, plain.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("respacing", ["2", "3", "6", "9"])
def test_ddim_with_all_its_noise_is_finite(respacing: str) -> None:
    # With eta = 1 the last term of DDIM's equation 12 is rounded to just below 0 for some of these.
    denoiser = tiny_denoiser()
    cosine = Denoiser(denoiser.unet, None, DiffusionConfig(noise_schedule="cosine"))
    spec = SampleSpec(label=1, respacing=respacing, sampler=Sampler.DDIM, eta=1.0)
    assert sample(cosine, [spec]).isfinite().all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SampleSpec(label=None), "label: .*0 to 9"),
        (SampleSpec(label=10), "label: 10 is not between 0 and 9"),
        (SampleSpec(label=0, eta=1.5), "eta: 1.5 is not between 0 and 1"),
        (SampleSpec(label=0, guidance_scale=float("nan")), "guidance_scale"),
        (SampleSpec(label=0, guidance_interval=(5, 4)), "guidance_interval"),
        (SampleSpec(label=0, respacing="1001"), "respacing"),
        (SampleSpec(label=0, seed=-1), "seed"),
        (SampleSpec(label=0, sampler=Sampler.DDIM_ENCODE, guidance_scale=1.0), "guidance_scale"),
    ],
)
def test_bad_specs_are_refused_by_field(spec: SampleSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleBatch(tiny_denoiser(), [spec])


def test_guidance_spends_nothing_on_parameters_or_recomputation() -> None:
    denoiser = tiny_denoiser()
    assert denoiser.classifier is not None
    denoiser.classifier.gradient_checkpointing = True  # must have no effect outside training
    passes: list[int] = []
    block = denoiser.classifier.middle_block
    block.register_forward_pre_hook(lambda *_: passes.append(1))
    batch = SampleBatch(denoiser, [SampleSpec(label=1, guidance_scale=1.0, respacing="4")])
    batch.step()
    assert len(passes) == 1
    assert all(p.grad is None and not p.requires_grad for p in denoiser.classifier.parameters())


def test_unconditional_model_can_be_guided() -> None:
    config = ClassifierConfig(**tiny_classifier)
    unet = UNetConfig(
        image_size=config.image_size,
        model_channels=32,
        out_channels=6,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 1),
    )
    assert tiny_denoiser().classifier is not None
    denoiser = Denoiser(with_weights(UNet(unet)), tiny_denoiser().classifier, DiffusionConfig())
    guided = sample(denoiser, [SampleSpec(label=1, guidance_scale=30.0, respacing="4")])
    assert not torch.equal(guided, sample(denoiser, [SampleSpec(respacing="4")]))
    with pytest.raises(ValueError, match="label: guidance needs a class"):
        denoiser.check(SampleSpec(guidance_scale=1.0))


def test_threefry_known_answers() -> None:
    """Known answers of the algorithm's authors (Random123)."""

    def run(*words: int) -> tuple[int, int]:
        key0, key1, c0, c1 = (torch.tensor(w - (1 << 32) if w >> 31 else w, dtype=torch.int32) for w in words)
        a, b = threefry2x32((key0, key1), (c0, c1))
        return int(a) & 0xFFFFFFFF, int(b) & 0xFFFFFFFF

    assert run(0, 0, 0, 0) == (0x6B200159, 0x99BA4EFE)
    assert run(*[0xFFFFFFFF] * 4) == (0x1CB996FC, 0xBB002BE7)
    assert run(0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3) == (0xC4923A9C, 0x483DF7A0)


def test_noise_is_standard_normal() -> None:
    keys = noise_keys([0, MAX_SEED], [0, 0])
    x = normal(keys, torch.tensor([0, 3]), (3, 128, 128)).flatten()
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    assert abs(float((x**4).mean()) - 3) < 0.2


def test_streams_differ_by_seed_stage_and_draw() -> None:
    keys = noise_keys([1, 2, 1, 1 + 2**32, 1], [0, 0, 1, 0, 0])
    x = normal(keys, torch.tensor([0, 0, 0, 0, 1]), (3, 32, 32)).flatten(1)
    correlation = torch.corrcoef(x) - torch.eye(5)
    assert correlation.abs().max() < 0.08


def test_random_label_belongs_to_the_seed() -> None:
    assert random_label(3, 10) == random_label(3, 10)
    assert {random_label(seed, 10) for seed in range(200)} == set(range(10))
