from functools import partial

import pytest
import torch

from demem_lab.optimizers import SGD, AdamW, Cosine, HalfFlat, StepDecay, WarmUp


def run_ours(settings, gradients, factors):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6))
    running = settings.start([p])
    for g, f in zip(gradients, factors, strict=True):
        running.apply([g], f)
    return p.detach(), running


def run_torch(make, gradients, factors, m):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)[m].clone())
    optimizer = make([p])
    base = optimizer.param_groups[0]["lr"]
    for g, f in zip(gradients, factors, strict=True):
        optimizer.param_groups[0]["lr"] = base * f
        p.grad = g[m].clone()
        optimizer.step()
    return p.detach()


GRADIENTS = [torch.randn(2, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(7)]
FACTORS = [1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.1]


@pytest.mark.parametrize(("decay", "momentum"), [(0.0, 0.9), (0.01, 0.9), (0.01, 0.0)])
def test_sgd_is_torchs_with_a_rate_for_each_model(decay, momentum):
    ours, _ = run_ours(SGD(lr=(0.1, 0.03), momentum=momentum, weight_decay=decay), GRADIENTS, [1.0] * 7)
    for m, lr in enumerate((0.1, 0.03)):
        kind = partial(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=decay)
        theirs = run_torch(kind, GRADIENTS, [1.0] * 7, m)
        assert torch.allclose(ours[m], theirs, atol=1e-12)


def test_sgd_schedule_scales_the_step_not_the_momentum():
    ours, _ = run_ours(SGD(lr=0.1), GRADIENTS, FACTORS)
    assert torch.allclose(ours[0], run_torch(lambda p: torch.optim.SGD(p, 0.1, 0.9), GRADIENTS, FACTORS, 0), atol=1e-12)


def test_adamw_is_torchs():
    ours, _ = run_ours(AdamW(lr=(1e-2, 3e-3), weight_decay=0.1), GRADIENTS, FACTORS)
    for m, lr in enumerate((1e-2, 3e-3)):
        theirs = run_torch(lambda p, lr=lr: torch.optim.AdamW(p, lr, weight_decay=0.1), GRADIENTS, FACTORS, m)
        assert torch.allclose(ours[m], theirs, atol=1e-9)


@pytest.mark.parametrize("settings", [SGD(lr=0.1), AdamW(lr=0.01)])
def test_state_survives_a_resume(settings):
    whole, _ = run_ours(settings, GRADIENTS, FACTORS)
    half, running = run_ours(settings, GRADIENTS[:3], FACTORS[:3])
    p = torch.nn.Parameter(half.clone())
    again = settings.start([p])
    again.load(running.state())
    for g, f in zip(GRADIENTS[3:], FACTORS[3:], strict=True):
        again.apply([g], f)
    assert torch.equal(p.detach(), whole)


def test_schedules():
    assert [HalfFlat()(t, 10) for t in (0, 5, 9, 10)] == [1.0, 1.0, pytest.approx(0.2), 0.0]
    assert [Cosine()(t, 10) for t in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    assert [StepDecay((0.5, 0.75), 0.1)(t, 8) for t in (3, 4, 6)] == pytest.approx([1.0, 0.1, 0.01])


@pytest.mark.parametrize("settings", [SGD(lr=(0.1, 0.0)), AdamW(lr=(0.01, 0.0))])
def test_a_model_whose_rate_is_zero_stays_where_it_is(settings):
    found, _ = run_ours(settings, GRADIENTS, FACTORS)
    start = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)
    assert torch.equal(found[1], start[1]) and not torch.equal(found[0], start[0])


@pytest.mark.parametrize("make", [
    lambda: SGD(lr=-1.0), lambda: SGD(lr=float("nan")), lambda: SGD(lr=(0.1, float("inf"))), lambda: SGD(momentum=1.0),
    lambda: AdamW(weight_decay=-0.1),
])
def test_bad_settings(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_one_rate_a_model_or_one():
    assert SGD(lr=(1.0, 2.0, 3.0)).for_models([2], 3).lr == (3.0,)
    with pytest.raises(ValueError, match="2 entries for 3 models"):
        SGD(lr=(1.0, 2.0)).for_models([0], 3)


@pytest.mark.parametrize("settings", [
    SGD(lr=0.1), SGD(lr=0.1, weight_decay=0.01), AdamW(lr=0.01, weight_decay=0.0), AdamW(lr=0.01, weight_decay=0.1),
])
def test_all_parameters_at_once_are_the_same_step(settings):
    def made():
        parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6) * k) for k in (1, 2)]
        return parameters, settings.start(parameters)

    (one, by_one), (all_, at_once) = made(), made()
    for count, (g, f) in enumerate(zip(GRADIENTS, FACTORS, strict=True), 1):
        by_one.apply([g, 3 * g], f)
        with torch.no_grad():
            at_once._at_once([g, 3 * g], *((f,) if isinstance(settings, SGD) else (0.01 * f, count)))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(one, all_, strict=True))


@pytest.mark.parametrize(("make", "words"), [
    (lambda: StepDecay((75, 90)), "a milestone must be .*got 75; milestones are shares of all steps"),
    (lambda: StepDecay((0.5,), factor=-1), "factor"), (lambda: HalfFlat(50), "tail must be .*share of all steps"),
])
def test_schedules_take_shares_not_epochs(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_warm_up_rises_to_the_schedule():
    warm = WarmUp(HalfFlat(0.5), 0.2)
    assert [round(warm(t, 20), 3) for t in range(20)] == [0.25, 0.5, 0.75, *[1.0] * 8, *[k / 10 for k in range(9, 0, -1)]]
    assert [WarmUp(Cosine(), 0.0)(t, 9) for t in range(9)] == [Cosine()(t, 9) for t in range(9)]
    with pytest.raises(ValueError, match="share"):
        WarmUp(Cosine(), 1.5)
