"""One call on arrays, files or a model: its numbers are those of the attacks by hand, and its words do not overstate them."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from demem_lab import audit as auditing
from demem_lab import membership, signals
from demem_lab.accounting import NoGuarantee
from demem_lab.attacks import PGD
from demem_lab.audit import audit, load_weights
from demem_lab.cli import app
from demem_lab.data import member_masks
from demem_lab.empirical import one_run_bound
from demem_lab.files import write
from demem_lab.leakage import by_group, canaries, evaluate, held_out_accuracy, proportion, reliably_found
from demem_lab.mechanisms import DPSGD
from demem_lab.membership import lira
from demem_lab.outputs import outputs_from_arrays
from demem_lab.report import AuditReport, page
from demem_lab.risk import deciles, memorization
from demem_lab.signals import logit_margin


def single(n=600, m=600, k=4, strength=2.0, seed=0, adversarial=False):
    rng, arrays = np.random.default_rng(seed), {}
    for side, size, extra in (("member", n, strength), ("nonmember", m, 0.0)):
        y = rng.integers(0, k, size)
        z = rng.normal(size=(size, k))
        z[np.arange(size), y] += 2 + extra * rng.gamma(1, 1, size)
        arrays |= {f"{side}_logits": z, f"{side}_labels": y}
        if adversarial:
            arrays[f"{side}_adv_logits"] = z - 1.5 * np.eye(k)[y]
    return arrays


def ensemble(models=8, n=1200, k=4, strength=3.0, seed=0):
    rng = np.random.default_rng(seed)
    member, y = member_masks(n, models, seed=seed).numpy(), rng.integers(0, k, n)
    z = rng.normal(size=(models, n, k)).astype(np.float32)
    z[:, np.arange(n), y] += 2 + strength * member * rng.gamma(0.5, 1, n)
    return {"logits": z, "labels": y, "membership": member, "adv_logits": z - np.eye(k, dtype=np.float32)[y]}


def test_one_model_by_hand():
    arrays = single(adversarial=True)
    report = audit(arrays)
    outputs = outputs_from_arrays(arrays)
    assert set(report.attacks) == {"confidence", "loss", "entropy", "modified_entropy", "label_robustness"}
    for name, signal in signals.SIGNALS.items():
        for query, table in (("clean", outputs.logits), ("adversarial", outputs.adv_logits)):
            scores, entry = signal(table, outputs.labels), report.attacks[name][query]
            found = evaluate(scores, outputs.membership, fprs=(0.1, 0.01))
            assert entry["auc"] == pytest.approx(found.auc[0]) and entry["members"] == entry["non_members"] == 600
            assert entry["balanced_accuracy"] == pytest.approx(found.balanced_accuracy[0])
            assert entry["balanced_accuracy_held_out"] == pytest.approx(held_out_accuracy(scores, outputs.membership)[0])
            assert set(entry["tpr_at_fpr"]) == {"0.1", "0.01"}  # 600 non-members do not resolve 0.001
            for fpr in (0.1, 0.01):
                rate, limits = entry["tpr_at_fpr"][f"{fpr:g}"], found.interval(fpr, model=0)
                assert (rate["estimate"], rate["low"], rate["high"]) == pytest.approx((limits.mean, limits.low, limits.high))
    right = outputs.logits[0].argmax(-1) == outputs.labels
    assert report.utility["accuracy, members"] == pytest.approx(right[:600].mean())
    assert report.attacks["label_robustness"]["clean"]["auc"] == pytest.approx(
        0.5 + (right[:600].mean() - right[600:].mean()) / 2
    )
    assert "0.001" in report.warnings[-1] and "LiRA and RMIA" in report.skipped and "got 1" in report.skipped["LiRA and RMIA"]


def test_a_rate_with_exactly_five_false_positives_is_shown():
    report = audit(single(n=100, m=100), fprs=(0.1, 0.05))
    assert set(report.attacks["loss"]["clean"]["tpr_at_fpr"]) == {"0.1", "0.05"}


def test_an_ensemble_by_hand():
    arrays = ensemble()
    report = audit(arrays, fprs=(0.1, 0.02))
    y, member = arrays["labels"], arrays["membership"]
    clean, moved = (signals.logit_margin(arrays[name], y) for name in ("logits", "adv_logits"))
    by_hand = {
        ("lira_online", "clean"): membership.lira(clean, member),
        ("lira_online", "adversarial"): membership.lira(moved, member),
        ("lira_offline", "clean"): membership.lira(clean, member, online=False),
        ("rmia", "adversarial"): membership.rmia(signals.confidence(arrays["adv_logits"], y), member),
        ("lira_online", "combined"): membership.lira(np.stack([clean, moved]), member),
    }
    for (name, query), scores in by_hand.items():
        found, entry = evaluate(scores, member, fprs=(0.1, 0.02)), report.attacks[name][query]
        assert entry["auc"] == pytest.approx(found.auc.mean()) and entry["targets"] == 8
        assert entry["tpr_at_fpr"]["0.02"]["estimate"] == pytest.approx(found.tpr[:, 1].mean())
    assert set(report.attacks) == set(auditing.ATTACKS)
    name, query, fpr = report.headline
    assert fpr == 0.02 and report.attacks[name][query]["tpr_at_fpr"]["0.02"]["estimate"] == max(
        e["tpr_at_fpr"]["0.02"]["estimate"] for queries in report.attacks.values() for e in queries.values()
    )
    kinds = {row["kind"] for row in report.groups}
    assert "class" in kinds and any(kind.startswith("risk (scored on the other half") for kind in kinds)
    tenths = [row["found"] for row in report.groups if row["kind"].startswith("risk")]
    assert tenths[-1] > 3 * np.mean(tenths[:5])  # the leak sits with those whom the other models memorize


def test_risk_groups_come_from_models_that_are_not_attacked():
    arrays = ensemble()
    half = auditing._two_halves(arrays["membership"])
    other = membership.twins(arrays["membership"])
    assert half.sum() == 4 and (half[other] == half).all()
    assert (
        auditing._two_halves(arrays["membership"][:6]) is None and auditing._two_halves(arrays["membership"][[0, 2] * 4]) is None
    )


def test_risk_groups_are_attacked_by_models_that_did_not_choose_them():
    arrays = ensemble(models=12)
    y, member, half = arrays["labels"], arrays["membership"], auditing._two_halves(arrays["membership"])
    margins = np.stack([signals.logit_margin(arrays[name][~half], y) for name in ("logits", "adv_logits")])
    tenth = deciles(memorization(signals.confidence(arrays["adv_logits"][half], y), member[half]).score)
    wanted = by_group(membership.lira(margins, member[~half]), member[~half], tenth, fpr=0.1)
    rows = [row for row in audit(arrays, fprs=(0.1,)).groups if row["kind"].startswith("risk")]
    for name in ("members", "found", "accused", "auc"):
        assert [row[name] for row in rows] == pytest.approx(wanted[name].tolist()), name
    assert {(row["attack"], row["query"]) for row in rows} == {("lira_online", "combined")}


@pytest.mark.parametrize("models", [8, 10, 14])
def test_every_target_of_the_other_half_has_a_reference_on_each_side(models):
    member = member_masks(60, models, seed=0).numpy()
    rest = member[~auditing._two_halves(member)]
    assert not membership.missing_references(rest, rest, "with") and not membership.missing_references(rest, ~rest, "without")
    assert "that takes 8" in audit(ensemble(models=6), fprs=(0.1,)).skipped["groups by risk"]


NOBODY = {"hard": np.arange(2000) < 200}


def scattering(models, seed, *, scatter=1.0, leak=0.0):
    """2,000 samples of two classes, where 200 scatter more or are given away to whoever trained on them, or neither."""
    rng, member = np.random.default_rng([seed, models]), member_masks(2000, models, seed=seed).numpy()
    z, y, hard = rng.normal(size=(models, 2000, 2)), rng.integers(0, 2, 2000), NOBODY["hard"]
    z[:, hard] *= scatter
    z[:, np.arange(2000), y] += 1 + leak * (member & hard)
    return {"logits": z, "labels": y, "membership": member}


@pytest.mark.parametrize("models", [8, 16])
@pytest.mark.parametrize("scatter", [1.0, 3.0])
def test_groups_show_no_leak_where_there_is_none(models, scatter):
    """Tenths by risk, and a group that scatters: as many members found as non-members accused, whoever chose the group."""
    seen = {}
    for seed in range(4):
        for row in audit(scattering(models, seed, scatter=scatter), fprs=(0.01,), groups=NOBODY).groups:
            seen.setdefault(row["group"], []).append(row)
    for group, rows in seen.items():
        found, accused, auc = (np.mean([row[name] for row in rows]) for name in ("found", "accused", "auc"))
        trials = sum(row["members"] for row in rows)  # as many non-members: complementary halves
        error = np.sqrt((found * (1 - found) + accused * (1 - accused)) / trials)
        assert abs(found - accused) < 3.5 * error, (group, found, accused)
        assert abs(auc - 0.5) < 5 * np.sqrt(1 / (6 * trials)), (group, auc)  # errors of targets that share samples go together
    if scatter == 1:
        trials = sum(row["members"] for row in seen["tenth 10"])
        found = proportion(round(sum(row["found"] * row["members"] for row in seen["tenth 10"])), trials)
        assert found.low < 0.01 < found.high, found
    else:
        assert np.mean([row["found"] for row in seen["hard"]]) > 0.05  # the threshold for all still finds most of them there


def test_a_group_that_leaks_is_found():
    for models in (8, 16):
        report = audit(scattering(models, 0, leak=5.0), fprs=(0.01,), groups=NOBODY)
        by_name = {row["group"]: row for row in report.groups}
        for group in ("hard", "tenth 10"):
            row = by_name[group]
            assert row["low"] > 5 * row["accused_high"] and row["auc"] > 0.7, (models, group)
        assert by_name["tenth 3"]["low"] < by_name["tenth 3"]["accused_high"]


def test_chance_looks_like_chance():
    arrays = ensemble(strength=0.0, seed=3)
    report = audit(arrays, fprs=(0.1,))
    for name, queries in report.attacks.items():
        for query, entry in queries.items():
            assert abs(entry["auc"] - 0.5) < 0.03, (name, query)
            assert abs(entry["balanced_accuracy_held_out"] - 0.5) < 0.03 and entry["tpr_at_fpr"]["0.1"]["estimate"] < 0.14


def test_saved_loaded_and_shown(tmp_path):
    report = audit(ensemble(), fprs=(0.1,), name="a <b> & c", planted=np.arange(1200) < 200, guarantee="(2, 1e-5)-DP, they say")
    assert AuditReport.load(report.save(tmp_path / "a.json")) == report
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["attacks"]["lira_online"]["clean"]["tpr_at_fpr"]["0.1"].keys() == {"estimate", "low", "high"}
    html = report.to_html()
    assert "a &lt;b&gt; &amp; c" in html and "<b> & c" not in html and "(2, 1e-5)-DP, they say" in html and "@media print" in html
    outside = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", outside)
    assert len(report.figures()) >= 5 and html.count('class="plot"') >= len(report.figures())
    assert report.canaries["canaries"] == 200 and "best of" in report.summary()
    frame = report.to_frame()
    assert (
        frame.loc[("lira_online", "combined"), "TPR at 10 % FPR"]
        == report.attacks["lira_online"]["combined"]["tpr_at_fpr"]["0.1"]["estimate"]
    )
    assert "2 audits" in page([report, report])
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="not an audit report"):
        AuditReport.load(tmp_path / "b.json")


def test_canaries_are_judged_by_the_attack_that_was_fixed_beforehand(tmp_path):
    """The one that finds most finds more canaries than it accuses others, also where nothing leaks."""
    arrays = ensemble()
    planted = np.arange(1200) < 200
    report = audit(arrays, fprs=(0.1,), planted=planted)
    fixed = {key: report.canaries[key] for key in ("attack", "query", "fpr")}
    assert fixed == {"attack": "lira_online", "query": "combined", "fpr": 0.1}
    margins = np.stack([logit_margin(arrays[name], arrays["labels"]) for name in ("logits", "adv_logits")])
    wanted = canaries(lira(margins, arrays["membership"]), arrays["membership"], planted, fpr=0.1)
    assert report.canaries == fixed | wanted and "lira_online" in report.to_html()
    older = json.loads(report.to_json())
    del older["canaries"]["attack"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    loaded = AuditReport.load(tmp_path / "older.json")
    assert loaded.canaries == {} and "audit the outputs again" in loaded.skipped["canaries"]


def test_the_figure_of_the_attacks_marks_whom_each_accuses():
    """Guessing finds as many members; with ties that is far from the rate asked for."""
    report = audit(ensemble(), fprs=(0.1,))
    found, guessed = report.figures()["attacks"].data
    wanted = {f"{n}, {q}": 100 * e["accused_at_fpr"]["0.1"] for n, qs in report.attacks.items() for q, e in qs.items()}
    assert dict(zip(guessed.y, guessed.x, strict=True)) == wanted and list(found.y) == list(guessed.y)


def test_coins_that_add_up_for_each_sample_are_not_independent():
    arrays = ensemble()
    half = np.random.default_rng(0).random(arrays["membership"].shape).argsort(0) < len(arrays["membership"]) // 2
    with pytest.raises(ValueError, match="every sample trained exactly 4 of 8 models.*leave independent_coins out"):
        audit(arrays | {"membership": half}, fprs=(0.1,), independent_coins=True)


def test_the_group_figure_marks_what_guessing_finds_in_each_group():
    arrays = ensemble()
    arrays["membership"] = arrays["membership"] | (arrays["labels"] == 2)  # a class without non-members has no such mark
    report = audit(arrays, fprs=(0.1,))
    rows = {row["group"]: row for row in report.groups if row["kind"] == "class"}
    assert rows["2"]["accused"] is None and rows["2"]["auc"] is None and json.loads(report.to_json())["groups"] == report.groups
    figure = report.figures()["by class"]
    found, guessed = figure.data
    assert list(found.y) == ["0", "1", "2", "3"] and list(guessed.y) == ["0", "1", "3"] and not figure.layout.shapes
    for mark, name in ((found, "found"), (guessed, "accused")):
        assert list(mark.x) == pytest.approx([100 * rows[group][name] for group in mark.y])
    one = rows["0"]
    assert guessed.error_x.array[0] == pytest.approx(100 * (one["accused_high"] - one["accused"]))
    html = report.to_html()
    assert "grey: guessing, the group&#x27;s own non-members accused" in html and "accused, %" in html
    assert f"{100 * one['accused']:.1f}\xa0({100 * one['accused_low']:.1f}\u2013\u2060{100 * one['accused_high']:.1f})" in html


def test_an_older_report_is_read_without_its_groups(tmp_path):
    report = audit(ensemble(), fprs=(0.1,))
    old = json.loads(report.to_json()) | {"format": 2}
    old["groups"] = [{"kind": "class", "group": "0", "members": 9, "auc": 0.5, "found": 0.1, "low": 0.0, "high": 0.3}]
    (tmp_path / "two.json").write_text(json.dumps(old))
    read = AuditReport.load(tmp_path / "two.json")
    said = read.skipped.pop("who is found, by group")
    assert "audit the outputs again" in said and read == replace(report, groups=[])
    assert not [title for title in read.figures() if title.startswith("by ")] and "By group" not in read.to_html()
    for number in (1, 4, None):
        (tmp_path / "other.json").write_text(json.dumps(old | {"format": number}))
        with pytest.raises(ValueError, match=f"not an audit report of this version of demem_lab .format {number}"):
            AuditReport.load(tmp_path / "other.json")


def test_no_number_without_its_conditions():
    promised = DPSGD(1.0).guarantee(sampling_rate=0.1, steps=10, delta=1e-5, n=100)
    report = audit(single(), guarantee=promised)
    assert report.guarantee == str(promised) and "not accounted" in report.to_html()
    assert "none known" in audit(single()).to_html()


def test_one_run_bounds_epsilon_only_for_independent_coins():
    assert "independent fair coin" in audit(single()).skipped["empirical epsilon"]
    report = audit(single(strength=8.0), independent_coins=True)
    assert report.empirical["epsilon_at_least"] > 0.5 and "epsilon &gt;= " in report.to_html()
    outputs = outputs_from_arrays(single(strength=8.0))
    by_hand = one_run_bound(-signals.cross_entropy(outputs.logits, outputs.labels)[0], outputs.membership[0], delta=1e-5)
    assert report.empirical["epsilon_at_least"] == by_hand.epsilon and report.empirical["attack"] == "loss"
    assert "at least 1,000" in audit(single(n=300, m=300), independent_coins=True).skipped["empirical epsilon"]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))

    def forward(self, x):
        return self.body(x)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    x, y = torch.rand(400, 1, 4, 4), torch.randint(0, 4, (400,))
    net = Small()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(200):  # by heart: there is nothing else to learn
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:200]), y[:200]).backward()
        optimizer.step()
    return net, (x[:200], y[:200]), (x[200:], y[200:])


def test_a_torch_model_with_its_data(trained):
    net, members, others = trained
    before = {name: p.clone() for name, p in net.state_dict().items()}
    report = audit(net, members=members, non_members=others, eps=0.02, fprs=(0.1,), autoattack=20, name="small")
    net.eval()
    with torch.no_grad():
        arrays = {
            "member_logits": net(members[0]).numpy(),
            "member_labels": members[1].numpy(),
            "nonmember_logits": net(others[0]).numpy(),
            "nonmember_labels": others[1].numpy(),
        }
    for side, (x, y) in (("member", members), ("nonmember", others)):
        z = PGD(0.02, 10, random_start=False)(net, x, y)
        arrays[f"{side}_adv_logits"] = net(z).detach().numpy()
    direct = audit(arrays, fprs=(0.1,))
    for name in direct.attacks:
        for query in ("clean", "adversarial"):
            if (name, query) != ("label_robustness", "adversarial"):  # asked at several radii, see below
                assert report.attacks[name][query]["auc"] == pytest.approx(direct.attacks[name][query]["auc"], abs=1e-3)
    assert report.utility == pytest.approx(direct.utility) and report.attacks["loss"]["clean"]["auc"] > 0.8
    strong = report.robustness["non-members under the query attack and PGD with restarts"]
    assert strong <= report.robustness["non-members, clean and on the adversarial inputs given"] + 1e-9
    assert 0 <= report.robustness["AutoAttack, the first 20 non-members"] <= 1
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())
    assert report.obtained["query attack"].startswith("PGD(eps=0.02, steps=10") and "0.02" in report.obtained["AutoAttack"]
    assert "not asked for" in audit(net, members=members, non_members=others, fprs=(0.1,)).skipped["AutoAttack"]
    levels = []
    for x, y in (members, others):
        moved = [x, *(PGD(0.02 * level, 10, random_start=False)(net, x, y) for level in (0.25, 0.5, 0.75, 1))]
        levels.append(np.mean([net(z).detach().numpy().argmax(1) == y.numpy() for z in moved], axis=0))
    member = np.arange(len(levels[0]) + len(levels[1])) < len(levels[0])
    by_hand = evaluate(np.concatenate(levels)[None], member[None], fprs=(0.1,))
    assert report.attacks["label_robustness"]["adversarial"]["auc"] == pytest.approx(by_hand.auc[0], abs=1e-3)


def test_a_model_that_only_blinds_the_attack_is_not_called_robust(trained):
    """Logits a thousand times as large: the softmax saturates, its slope is 0, and PGD on the cross-entropy stands still."""
    net, members, others = trained
    loud = nn.Sequential(net, type("Loud", (nn.Module,), {"forward": lambda self, z: 1e5 * z})())
    asked = {"members": members, "non_members": others, "eps": 0.1, "fprs": (0.1,)}
    quiet, found = audit(net, **asked), audit(loud, **asked)
    robust = "non-members under the query attack and PGD with restarts"
    assert found.robustness["non-members, clean and on the adversarial inputs given"] > quiet.robustness[robust] + 0.1  # blinded
    assert found.robustness[robust] <= quiet.robustness[robust] + 0.05
    assert any("gradient masking" in text for text in found.warnings) and "gradient masking" in found.to_html()
    assert not any("gradient masking" in text for text in quiet.warnings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"non_members": None}, "a model alone"),
        ({"eps": -1.0}, "eps"),
        ({"autoattack": 5, "eps": None}, "needs a radius"),
        ({"autoattack": 1000}, "autoattack"),
    ],
)
def test_a_model_without_what_it_needs(trained, change, words):
    net, members, others = trained
    with pytest.raises(ValueError, match=words):
        audit(net, **({"members": members, "non_members": others, "eps": 0.02, "fprs": (0.1,)} | change))


def test_the_same_images_on_both_sides_are_noticed(trained):
    net, members, _ = trained
    with pytest.raises(ValueError, match="equal inputs"):
        audit(net, members=members, non_members=members, fprs=(0.1,))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: audit(single(n=30, m=30)), "bring at least 50"),
        (lambda: audit(single(), eps=0.1), "belong to a torch.nn.Module"),
        (lambda: audit(single(), prior=2.0), "prior"),
        (lambda: audit(single(), delta=-1), "delta must be finite and >= 0 and <= 1, got -1"),
        (lambda: audit(single(), fprs=None), "fprs must be false positive rates such as .* got None"),
        (lambda: audit(single(), fprs="0.1"), "fprs must be false positive rates such as .* got '0.1'"),
        (lambda: audit(single(), groups=np.ones(1200, dtype=bool)), "groups must be bool .N. by name, .*, got "),
        (lambda: audit(single(), planted=np.zeros(1200, dtype=bool)), "planted marks no sample"),
        (lambda: audit(None), "subject must be arrays by name, .*, got None"),
        (lambda: audit(torch.nn.Linear), "not the class Linear; call it first"),
        (lambda: audit("none.npz"), "there is no file none.npz"),
        (lambda: audit(single(), groups={"a": np.ones(3, dtype=bool)}), "group 'a'"),
    ],
)
def test_bad_calls(call, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        call()


def test_a_path_is_read_and_one_rate_is_enough(tmp_path):
    path = write(tmp_path / "a.npz", single())
    found, wanted = audit(str(path), fprs=0.1), audit(single(), fprs=(0.1,), name="a.npz")
    assert found.attacks == wanted.attacks and found.name == "a.npz" and found.obtained["content"] == wanted.obtained["content"]


def test_weights_come_from_safetensors_and_plain_checkpoints_only(trained, tmp_path):
    from safetensors.torch import save_file

    net, _, _ = trained
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": net.state_dict()}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        loaded = load_weights(Small(), tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), net.parameters(), strict=True))
    torch.save(net, tmp_path / "whole.pt")  # a whole module is a pickle
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("whole.pt", "no.safetensors", "other.safetensors"):
        with pytest.raises(ValueError, match="does not hold weights"):
            load_weights(Small(), tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_weights(Small(), tmp_path / "none.pt")


def test_report_on_the_command_line(tmp_path):
    one, many = write(tmp_path / "one.npz", single()), write(tmp_path / "many.safetensors", ensemble())
    run = CliRunner().invoke(
        app, ["report", str(one), "--html", str(tmp_path / "o" / "a.html"), "--json", str(tmp_path / "a.json")]
    )
    assert run.exit_code == 0 and "strongest attack" in run.output and "not done: LiRA" in run.output
    assert AuditReport.load(tmp_path / "a.json") == replace(
        audit(single(), name="one.npz"), obtained=AuditReport.load(tmp_path / "a.json").obtained
    )
    assert "<html" in (tmp_path / "o" / "a.html").read_text()
    run = CliRunner().invoke(app, ["report", str(one), str(many), "--json", str(tmp_path / "b.json"), "--fpr", "0.1"])
    assert run.exit_code == 0 and set(json.loads((tmp_path / "b.json").read_text())["reports"]) == {"one.npz", "many.safetensors"}
    (tmp_path / "bad.npz").write_bytes(b"\x80\x04nonsense")
    for name in ("bad.npz", "none.npz"):
        assert CliRunner().invoke(app, ["report", str(tmp_path / name)]).exit_code == 2


def test_equal_outputs_are_no_safety():
    """Saturated: a third of the members and a tenth of the others have the very same, highest score."""
    arrays = single(n=900, m=900)
    for side, share in (("member", 3), ("nonmember", 10)):
        table = arrays[f"{side}_logits"]
        table[::share] = 60 * np.eye(4)[arrays[f"{side}_labels"][::share]]
    report = audit(arrays)
    assert report.headline[2] == 0.1  # at 1 % nobody can be accused
    assert all(report.attacks[n]["clean"]["tpr_at_fpr"]["0.01"]["estimate"] == 0 for n in ("loss", "confidence"))
    entry = report.attacks[report.headline[0]]["clean"]
    assert f"finds {entry['tpr_at_fpr']['0.1']['estimate']:.1%} of the members" in report.summary()
    assert f"is right for {100 * entry['balanced_accuracy_held_out']:.3g} % of them" in report.summary()
    assert any("10.0% of the non-members share the highest score with 33.3% of the members" in text for text in report.warnings)
    assert not any("share the highest score" in text for text in audit(single()).warnings)
    blind = {name: np.where(np.arange(4) == arrays[f"{name[:-7]}_labels"][:, None], 60.0, 0.0) if "logits" in name else array
             for name, array in arrays.items()}  # everything is answered rightly, and alike
    blind["nonmember_logits"][:600] = np.eye(4)[0]
    report = audit(blind)  # no rate is near: the attack whose one threshold is right most often
    held = {n: q["clean"]["balanced_accuracy_held_out"] for n, q in report.attacks.items()}
    assert report.headline == (max(held, key=held.get), "clean", 0.1) and "finds 0.0% of the members" in report.summary()


def test_what_guessing_finds_stands_beside_what_is_found():
    """Nothing leaks, and 30 runs agree: what is found is what guessing finds, not the rate itself, which is a little less."""
    found = []
    for seed in range(30):
        entry = audit(single(n=500, m=500, strength=0.0, seed=seed), fprs=(0.01,)).attacks["loss"]["clean"]
        assert entry["accused_at_fpr"]["0.01"] == pytest.approx(0.012)
        found.append(entry["tpr_at_fpr"]["0.01"]["estimate"])
    assert abs(np.mean(found) - 0.012) < 3 * np.std(found) / 30**0.5


def test_who_is_attacked_reliably_stands_in_the_report():
    arrays = ensemble(strength=6.0)
    report = audit(arrays, fprs=(0.1, 0.02))
    name, query, fpr = "lira_online", "combined", 0.02  # fixed beforehand: `report.headline` was chosen by its luck
    assert (report.reliable["attack"], report.reliable["query"], report.reliable["fpr"]) == (name, query, fpr)
    score = next(how for n, q, how in auditing._attacks(outputs_from_arrays(arrays), None, {}) if (n, q) == (name, query))
    scores = score(auditing.EVERY)
    found = reliably_found(scores, arrays["membership"], fpr=fpr, share=0.9)
    assert report.reliable["fraction"] == found.fraction > 0 and report.reliable["never_found"] == (found.hit == 0).mean()
    assert report.reliable["by_chance"] == found.by_chance
    assert "90% of the 4 targets that trained on them" in report.to_html() and "By chance it would be" in report.to_html()
    older = replace(report, reliable={k: v for k, v in report.reliable.items() if k != "by_chance"})
    assert "write the report anew" in older.to_html()
    assert "at least 4 targets" in audit(single()).skipped["samples attacked reliably"]


def test_an_offline_attacker_has_shadow_models_without_the_sample_only():
    """Members of the first model are in no other training set: in-references are lacking, out-references are not."""
    arrays = ensemble(models=8, n=600)
    member = np.zeros((8, 600), dtype=bool)
    for m in range(8):
        member[m, 75 * m : 75 * (m + 1)] = True
    z = arrays["logits"].copy()
    z[:, np.arange(600), arrays["labels"]] += 3 * member
    report = audit({"logits": z, "labels": arrays["labels"], "membership": member}, fprs=(0.1,))
    assert "lira_online" not in report.attacks and "offline attacks stand in" in report.skipped["LiRA online and RMIA online"]
    margin, p = signals.logit_margin(z, arrays["labels"]), signals.confidence(z, arrays["labels"])
    for name, scores in (
        ("lira_offline", membership.lira(margin, member, online=False)),
        ("rmia", membership.rmia(p, member, offline_a=auditing.OFFLINE_A)),
    ):
        auc = evaluate(scores, member).auc.mean()
        assert report.attacks[name]["clean"]["auc"] == pytest.approx(auc) and auc > 0.8


def test_a_class_that_everybody_trained_on_leaves_out_thresholds_by_class_and_nothing_else():
    arrays = ensemble()
    arrays["membership"] = arrays["membership"] | (arrays["labels"] == 2)
    report = audit(arrays, fprs=(0.1,))
    assert "class 2 has no out-reference" in report.skipped["thresholds by class from shadow models"]
    assert "by_class" not in report.attacks["loss"]["clean"] and "by_class" in audit(ensemble()).attacks["loss"]["clean"]


def test_coins_that_were_not_tossed_are_refused():
    with pytest.raises(ValueError, match="not what fair coins give"):
        audit(ensemble(), independent_coins=True)
    with pytest.raises(ValueError, match="not what fair coins give"):
        audit(single(n=900, m=600), independent_coins=True)
    arrays = ensemble(strength=9.0)
    arrays["membership"] = member_masks(1200, 6, seed=0, design="independent").numpy()
    found = audit({name: a[:6] if a.ndim > 1 else a for name, a in arrays.items()}, independent_coins=True).empirical
    assert found["targets"] == 6 and found["confidence"] == 0.95 and "97.5 %" in found["condition"]


def test_the_median_over_targets_is_no_luckier_than_one_target():
    """Three copies of one target are one target: the bound over them must not be larger than what 95 % allow."""
    scores = np.random.default_rng(0).normal(size=2000)
    coins = np.random.default_rng(1).random(2000) < 0.5
    scores = scores + 2 * coins
    one = auditing._empirical("loss", "clean", scores[None], coins[None], 1e-5, True, {})
    three = auditing._empirical("loss", "clean", np.tile(scores, (3, 1)), np.tile(coins, (3, 1)), 1e-5, True, {})
    assert 0 < three["epsilon_at_least"] < one["epsilon_at_least"]


def test_of_an_even_number_of_targets_the_lower_one_in_the_middle_speaks():
    rng = np.random.default_rng(0)
    coins = rng.random((2, 2000)) < 0.5
    scores = rng.normal(size=(2, 2000)) + np.array([[1.0], [3.0]]) * coins
    both, lower = (
        auditing._empirical("loss", "clean", s, c, 1e-5, True, {})
        for s, c in ((scores, coins), (scores[[0, 0]], coins[[0, 0]]))
    )
    assert 0 < both["epsilon_at_least"] == lower["epsilon_at_least"]


def test_free_words_about_a_guarantee_are_marked_as_such():
    assert "not checked here" in audit(single(), guarantee="epsilon 1").guarantee
    assert audit(single(), guarantee=NoGuarantee("no noise")).guarantee == "no guarantee: no noise"


@pytest.mark.parametrize("fprs", [(), (0.0,), (-0.1,), (1.5,), (float("nan"),)])
def test_bad_rates(fprs):
    with pytest.raises(ValueError, match="false positive rate"):
        audit(single(), fprs=fprs)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_any_size_and_precision_of_logits_gives_numbers(kind, scale):
    arrays = ensemble(models=6, n=400, k=2)
    arrays = {name: (a * scale).clip(-6e4, 6e4).astype(kind) if "logits" in name else a for name, a in arrays.items()}
    report = audit(arrays, fprs=(0.1,))
    assert json.loads(report.to_json()) and all(0 <= e["auc"] <= 1 for q in report.attacks.values() for e in q.values())
    many = np.random.default_rng(0).normal(size=(400, 100)).astype(kind)
    y = np.arange(400) % 100
    halves = {"member_logits": many[:200], "member_labels": y[:200], "nonmember_logits": many[200:], "nonmember_labels": y[200:]}
    assert audit(halves, fprs=(0.1,)).obtained["classes"] == 100


def test_a_stranger_cannot_write_the_page(tmp_path):
    evil = "<!--<script>alert(1)</script><img src=x onerror=alert(2)>"
    report = audit(single(), fprs=(0.1,), name=evil, guarantee=evil, groups={evil: np.arange(1200) % 2 > 0})
    html = report.to_html()
    assert "<!--<script>" not in html.split("</script>", 1)[1] and "<img src=x" not in html


def test_npy_files_and_equal_names_on_the_command_line(tmp_path):
    arrays = single()
    for name, a in arrays.items():
        np.save(tmp_path / f"{name}.npy", a)
    one = write(tmp_path / "one.npz", arrays)
    files = [str(tmp_path / f"{name}.npy") for name in arrays]
    run = CliRunner().invoke(app, ["report", *files, str(one), str(one), "--json", str(tmp_path / "a.json"), "--fpr", "0.1"])
    found = json.loads((tmp_path / "a.json").read_text())["reports"]
    assert run.exit_code == 0 and list(found) == ["one.npz", "one.npz (2)", tmp_path.name]
    assert found["one.npz"]["attacks"] == found["one.npz (2)"]["attacks"] == found[tmp_path.name]["attacks"]
    run = CliRunner().invoke(app, ["report", str(one), "--html", str(tmp_path)])
    assert run.exit_code == 2 and "cannot be written" in run.output
    for rate in ("0", "-1", "nan", "0.0001"):
        run = CliRunner().invoke(app, ["report", str(one), "--fpr", rate])
        assert run.exit_code == 2 and "false positive rate" in run.output and "Traceback" not in run.output


@pytest.mark.parametrize("models", [2, 3])
def test_complementary_twins_are_no_independent_coins(models):
    coins = np.random.default_rng(0).random((2, 1200)) < 0.5
    arrays = ensemble(models=models + models % 2) | {"membership": np.stack([coins[0], ~coins[0], coins[1]])[:models]}
    arrays = {name: a[:models] if a.ndim > 1 else a for name, a in arrays.items()}
    with pytest.raises(ValueError, match="models 0 and 1 were trained on complementary halves.*leave independent_coins out"):
        audit(arrays, independent_coins=True, fprs=(0.1,))
    assert "independent_coins=True" in audit(arrays, fprs=(0.1,)).skipped["empirical epsilon"]


def test_the_report_says_what_its_intervals_are():
    one, many = audit(single(), fprs=(0.1,)), audit(ensemble(), fprs=(0.1,))
    assert "the uncertainty of the threshold included" in one.obtained["intervals"]
    assert "t-interval over targets" in many.obtained["intervals"]
    for report in (one, many):
        assert f"95 % intervals ({report.obtained['intervals']})" in report.to_html()
    assert "take the threshold as given" in many.to_html()
