"""The suggestion: it fits, it is the gentlest that does, a larger card never gets a worse one; what
a run showed is answered. By arithmetic, and by real plans of the demo base and SD 1.5's shapes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import i18n
from core.config import TrainConfig, size_of
from core.errors import UserError
from core.importers import load_train_config
from core.memory import advisor, plan, plan_inputs, relief, troubleshooting
from core.memory.advisor import PURPOSES, Suggestion
from core.memory.plan import Data, Machine, Phase, Plan
from core.memory.relief import Capabilities, Knob
from tests.planned import NOWHERE, SHAPE, Synthetic, advise, card, lasting_home, traces

__all__ = ["lasting_home", "traces"]

FAST = settings(max_examples=120, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])
gigabytes = st.floats(1, 40)
purposes = st.sampled_from(sorted(PURPOSES))
datas = st.none() | st.builds(Data, pictures=st.integers(1, 3000))
weights = st.floats(200, 12_000)


def area(found: Suggestion) -> int:
    width, height = size_of(found.values["max_resolution"]) or (0, 0)
    return width * height


# --- properties ---

@FAST
@given(gigabytes, st.floats(0, 3000), purposes, datas, weights)
def test_suggestion_fits_its_plan(gb: float, held: float, purpose: str, data: Data | None,
                                  heavy: float) -> None:
    machine = card(gb, min(held, gb * 1024))
    planner = Synthetic(machine, weights=heavy)
    found = advise(machine, purpose, data, planner)
    assert found.plan == planner(found.config())
    assert found.plan.machine == machine
    if found.fits:
        assert found.plan.needs_mb <= found.room_mb * (1 - plan.MARGIN)
        assert area(found) >= 512 ** 2 / 2
    else:
        assert found.needs_mb > found.room_mb * (1 - plan.MARGIN)
        assert any(note.key == "advisor.does_not_fit" for note in found.notes)


@FAST
@given(gigabytes, st.floats(0, 30), st.floats(0, 1), purposes, datas, weights)
def test_larger_card_never_gets_a_worse_one(gb: float, more: float, share: float, purpose: str,
                                            data: Data | None, heavy: float) -> None:
    held = min(gb * 1024, 2500 * share)
    small, large = card(gb, held), card(gb + more, held)
    found, better = (advise(m, purpose, data, Synthetic(m, weights=heavy))
                     for m in (small, large))
    assert better.score >= found.score
    assert better.values["lora_rank"] >= found.values["lora_rank"]
    assert area(better) >= area(found)
    assert better.fits >= found.fits
    if found.fits and better.score == found.score:
        assert better.values == found.values


@FAST
@given(gigabytes, purposes, st.integers(1, 3000), weights)
def test_pictures_an_update_are_the_purposes_own(gb: float, purpose: str, pictures: int,
                                                 heavy: float) -> None:
    machine = card(gb)
    found = advise(machine, purpose, Data(pictures), Synthetic(machine, weights=heavy)).values
    effective = found["batch_size"] * found["gradient_accumulation_steps"]
    assert effective == advisor.effective_batch(PURPOSES[purpose], pictures)
    assert effective <= PURPOSES[purpose].effective
    assert effective == 1 or 2 * effective <= pictures


def arithmetic(costs: dict[str, list[float]], machine: Machine) -> relief.Planner:
    """A planner whose needs are a sum over knobs: `rank`, `offload` ... stand for any key."""
    def planned(config: TrainConfig) -> Plan:
        needs = sum(of[int(getattr(config, key))] for key, of in costs.items())
        return Plan(machine, (Phase("train", {"all": needs}),), {}, {}, {}, (512, 512), 1, 1)
    return planned


@FAST
@given(st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=5), min_size=1, max_size=5),
       st.floats(0, 300))
def test_search_finds_what_trying_everything_finds(falls: list[list[float]], free: float) -> None:
    keys = ("save_steps", "keep_checkpoints", "sample_every", "keep_tokens", "lr_warmup_steps")
    costs = {key: sorted(of, reverse=True) for key, of in zip(keys, falls, strict=False)}
    knobs = [Knob(key, tuple({key: i} for i in range(len(of)))) for key, of in costs.items()]
    planner = arithmetic(costs, Machine("cpu", "", 0, free))
    start = TrainConfig(**dict.fromkeys(costs, 0))
    found = relief.search(start, knobs, planner, lambda p: p.needs_mb <= free)
    every = itertools.product(*(range(len(of)) for of in costs.values()))
    fitting = [at for at in every if sum(
        of[i] for of, i in zip(costs.values(), at, strict=True)) <= free]
    if not fitting:
        assert found is None
        return
    assert found is not None
    gentlest = min(fitting, key=lambda at: at[::-1])
    assert tuple(found.chosen.values()) == gentlest
    assert all(p.needs_mb > free for p in found.without.values())
    assert set(found.without) == {key for key, i in found.chosen.items() if i}


@FAST
@given(gigabytes, purposes, weights)
def test_few_plans_are_enough(gb: float, purpose: str, heavy: float) -> None:
    asked: list[TrainConfig] = []
    machine = card(gb)
    synthetic = Synthetic(machine, weights=heavy)

    def counting(config: TrainConfig) -> Plan:
        asked.append(config)
        return synthetic(config)
    advise(machine, purpose, planner=counting)
    assert len(asked) <= 30


@FAST
@given(st.integers(1, 64), st.integers(1, 16), st.floats(1, 3))
def test_rate_follows_the_batch_and_undoes_the_scale(effective: int, rank: int, factor: float
                                                     ) -> None:
    rate = advisor.learning_rate
    assert rate(effective + 1, rank, rank, 860e6) >= rate(effective, rank, rank, 860e6)
    assert rate(effective, rank, rank * factor, 860e6) <= rate(effective, rank, rank, 860e6)
    assert rate(4, 8, 8, 860e6) == 2e-4             # the described config: batch 4, 2e-4
    assert rate(4, 8, 8, 7e6) > rate(4, 8, 8, 860e6)


# --- the order of sacrifice ---

def test_sacrifices_come_in_order() -> None:
    """As the card shrinks, each is first taken after the one before it."""
    taken: dict[str, float] = {}
    for gb in [x / 10 for x in range(240, 10, -1)]:
        values = advise(card(gb, held_mb=300), "style").values
        for name, gone in (("batch", values["batch_size"] < 8),
                           ("checkpointing", values["gradient_checkpointing"]),
                           ("base", values["base_precision"] != "same"),
                           ("offload", values["offload"] > 0),
                           ("rank", values["lora_rank"] < 8),
                           ("resolution", area_of(values) < 512 ** 2)):
            if gone:
                taken.setdefault(name, gb)
    order = ["batch", "checkpointing", "base", "offload", "rank", "resolution"]
    assert list(taken) == [name for name in order if name in taken]
    assert {"batch", "checkpointing", "base", "offload"} <= set(taken)
    assert sorted(taken.values(), reverse=True) == list(taken.values())


def area_of(values: Any) -> int:
    width, height = size_of(values["max_resolution"]) or (0, 0)
    return width * height


def test_int8_comes_before_nf4_and_fp8_never() -> None:
    seen = [advise(card(gb / 10, held_mb=0)).values["base_precision"] for gb in range(60, 10, -1)]
    kinds = list(dict.fromkeys(seen))
    assert [kind for kind in kinds if kind in ("same", "int8", "nf4")][:3] == [
        "same", "int8", "nf4"]
    assert "fp8" not in kinds


def test_below_half_the_area_is_named_and_never_called_a_fit() -> None:
    found = None
    for mb in range(2400, 300, -10):
        machine = card(mb / 1024, held_mb=0)
        found = advise(machine, planner=Synthetic(machine, weights=100, picture=4000, drawing=1))
        if not found.fits:
            break
    assert found is not None
    assert not found.fits
    keys = [note.key for note in found.notes]
    assert area(found) < 512 ** 2 / 2
    assert keys[:2] == ["advisor.does_not_fit", "advisor.would_fit_at"]
    assert found.reasons["max_resolution"].key == "advisor.resolution_poor"
    assert found.plan.verdict(plan.room(found.plan.machine)) == "fits"


def test_nothing_fits_names_the_smallest_need_and_a_card_that_would_do() -> None:
    machine = card(2)
    found = advise(machine, planner=Synthetic(machine, drawing=3000))
    assert not found.fits
    assert found.needs_mb == found.plan.needs_mb > machine.free_mb
    needed = next(n for n in found.notes if n.key == "advisor.card_needed")
    big = advisor.card_of(needed.params["gb"])
    assert advise(big, planner=Synthetic(big, drawing=3000)).fits


def test_what_others_may_take_is_kept_back() -> None:
    busy, calm = card(8, 1500), card(8, 0)
    assert plan.room(busy) == busy.free_mb - 375
    assert plan.room(calm) == calm.free_mb
    assert plan.room(card(24, 8000)) == 16 * 1024 - 8000 + 8 * 1024 - 512
    plan_ = replace(Synthetic(busy)(TrainConfig()), outside={"context": 0.0}, phases=(
        Phase("train", {"all": busy.free_mb * 0.92 - 100}),))
    # The run's event and the memory bar say what the checklist and the `plan` command say.
    assert plan_.verdict() == plan.as_dict(plan_)["verdict"] == "tight"
    assert replace(plan_, phases=(Phase("train", {"all": 9000}),)).verdict() == "too_big"


@pytest.mark.parametrize(("kind", "capability", "precision"), [
    ("cuda", (8, 6), "bf16"), ("cuda", (7, 5), "fp16"), ("cuda", (6, 1), "fp32"),
    ("cuda", (0, 0), "bf16"), ("cpu", (0, 0), "fp32"), ("mps", (0, 0), "fp32")])
def test_precision_is_the_devices_own(kind: Any, capability: tuple[int, int], precision: str
                                      ) -> None:
    machine = Machine(kind, "x", 64e3, 60e3, capability)
    found = advise(machine)
    assert found.values["precision"] == precision
    assert found.reasons["precision"].key == f"advisor.precision_{precision}"


def test_cpu_short_of_memory_takes_bf16_before_it_quantises() -> None:
    seen = {}
    for mb in range(9000, 2500, -50):
        machine = Machine("cpu", "CPU", mb, mb)
        values = advise(machine).values
        assert values["offload"] == 0
        seen.setdefault((values["precision"], values["base_precision"]), mb)
    assert list(seen)[:3] == [("fp32", "same"), ("bf16", "same"), ("bf16", "int8")]


def test_only_what_the_engine_can_do_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relief, "find_spec", lambda package: object())
    assert relief.capabilities(card(8)).optimizers == ("adamw", "adamw8bit")
    assert relief.capabilities(Machine("cpu", "", 8e3, 8e3)) == Capabilities("bf16", full=True)
    monkeypatch.setattr(relief, "find_spec", lambda package: None)
    assert relief.capabilities(card(8)).optimizers == ("adamw",)
    assert relief.capabilities(card(8, ram_mb=4000), 4000).offloads == (0.25, 0.5)
    assert relief.capabilities(card(8), 4000).offloads == relief.OFFLOADS


def test_purposes_and_pictures_decide_rank_and_length() -> None:
    big = card(24)
    def ranks(pictures: int) -> list[int]:
        return [advise(big, name, Data(pictures)).values["lora_rank"]
                for name in ("style", "character", "object", "concept")]
    assert ranks(50) == [8, 16, 16, 32]
    assert ranks(10) == [8, 16, 8, 16]
    lengths = [advise(big, "character", Data(n)).values["epochs"] for n in (5, 20, 100, 1000)]
    assert lengths == [240, 100, 100, 16]
    assert "max_train_steps" in advise(big, "character").values
    low = advise(card(1.5, 0), planner=Synthetic(card(1.5, 0), weights=200, drawing=100,
                                                 picture=700, adapter=40), data=Data(20))
    assert low.values["lora_rank"] == 4
    assert low.values["epochs"] == 150                 # low rank: more rounds
    assert low.reasons["epochs"].key == "advisor.epochs_low_rank"


def test_unknown_purpose_is_a_fault() -> None:
    with pytest.raises(UserError, match=r"style, character"):
        advise(card(8), "styl")


@pytest.mark.parametrize("lang", i18n.LANGUAGES)
@pytest.mark.parametrize("machine", [
    card(24), card(8), card(4), card(2.2), card(1.2), Machine("cpu", "CPU", 2500, 2500),
    card(8, ram_mb=1000, disk_mb=5)], ids=lambda m: f"{m.name}{m.total_mb:.0f}")
def test_every_value_has_its_sentence(machine: Machine, lang: str) -> None:
    for purpose, data in itertools.product(PURPOSES, (None, Data(7))):
        found = advise(machine, purpose, data)
        assert found.reasons.keys() == found.values.keys() <= TrainConfig.model_fields.keys()
        for reason in (*found.reasons.values(), *found.notes):
            text = reason.text(lang)
            assert reason.key in i18n.catalogue(lang)
            assert "{" not in text
            assert not text.startswith("advisor.")
    assert advisor.as_dict(found)["values"] == dict(found.values)


# --- the nearest fit ---

def test_nearest_fit_changes_as_little_as_it_can(traces: Path) -> None:
    base, cpu = plan_inputs.base_of("demo"), Machine("cpu", "CPU", 1e5, 1e5)
    config = TrainConfig(base_model="demo", batch_size=6, lora_alpha=4)
    enough = advisor.nearest_fit(config, base, cpu, plan_inputs.BatchPlanner(base, cpu))
    assert enough is not None
    assert enough[0] == {}
    machine = card(8)
    found = advisor.nearest_fit(config, base, machine, Synthetic(machine))
    assert found is not None
    changes, planned = found
    assert changes == {"batch_size": 3, "gradient_accumulation_steps": 2}
    assert planned.fits
    assert advisor.nearest_fit(config, base, card(1), Synthetic(card(1), drawing=4000)) is None


def test_nearest_fit_keeps_the_scale_and_drops_previews_late(traces: Path) -> None:
    config = TrainConfig(lora_rank=64, lora_alpha=32, sample_prompts=["a"], precision="fp32",
                         max_resolution="768,512")
    names = [d.name for d in relief.knobs(config, Capabilities(), 512, 64) if len(d.options) > 1]
    assert names == ["cache", "checkpointing", "previews", "precision", "base", "rank",
                     "resolution"]
    by_name = {d.name: d.options[1] for d in relief.knobs(config, Capabilities(), 512, 64)
               if len(d.options) > 1}
    assert by_name["rank"] == {"lora_rank": 32, "lora_alpha": 16}
    assert by_name["resolution"] == {"max_resolution": "640,448"}


# --- what a run showed ---

def answered(symptom: str, config: TrainConfig, machine: Machine | None = None, **more: Any
             ) -> list[troubleshooting.Advice]:
    if machine is None:
        return troubleshooting.answer(symptom, config, None, troubleshooting.Facts(**more))
    planner = Synthetic(machine)
    facts = troubleshooting.Facts(planner=planner, capabilities=relief.capabilities(machine),
                                  **more)
    return troubleshooting.answer(symptom, config, planner(config), facts)


def test_oom_at_the_start_is_answered_with_smaller_batches_first() -> None:
    found = answered("oom_start", TrainConfig(batch_size=8), card(6, held_mb=2500))
    assert [a.key for a in found][:2] == ["advisor.do_close_others", "advisor.do_together"]
    together = TrainConfig(batch_size=8).with_changes(**found[1].changes)
    assert Synthetic(card(6, held_mb=2500))(together).fits
    rest = {a.key: a for a in found[2:]}
    batch = rest["advisor.do_batch"]
    assert batch.changes == {"batch_size": 2, "gradient_accumulation_steps": 4}
    assert batch.saves_mb == pytest.approx(6 * 1100)
    assert next(iter(rest)) == "advisor.do_batch"         # caching alone saves nothing
    assert rest["advisor.do_checkpointing"].saves_mb > 0        # type: ignore[operator]
    assert batch.fix.changes == dict(batch.changes)


def test_oom_in_mid_run_is_answered_with_448_px() -> None:
    config = TrainConfig(precision="fp32", sample_prompts=["a"], sample_every=10)
    found = {a.key: a for a in answered("oom_run", config)}
    assert found["advisor.do_resolution"].changes == {"max_resolution": "448,448"}
    assert found["advisor.do_precision"].changes == {"precision": "bf16"}
    assert found["advisor.do_previews"].changes["sample_prompts"] == []
    assert found["advisor.do_resolution"].saves_mb is None


def test_swinging_loss_takes_accumulation_and_a_lower_rate() -> None:
    found = answered("loss_swings", TrainConfig(learning_rate=4e-4, max_grad_norm=0), card(8),
                     updates=400)
    changes = {a.key.removeprefix("advisor.do_"): dict(a.changes) for a in found}
    assert changes == {"accumulate": {"gradient_accumulation_steps": 2},
                       "half_rate": {"learning_rate": 2e-4}, "warmup": {"lr_warmup_steps": 20},
                       "clip": {"max_grad_norm": 1.0}, "min_snr": {"min_snr_gamma": 5.0}}


def test_weak_result_takes_rank_16_and_longer_if_memory_is_to_spare() -> None:
    config = TrainConfig(lora_alpha=1, epochs=10)
    found = {a.key: dict(a.changes) for a in answered("weak", config, card(8))}
    assert found["advisor.do_more_rank"] == {"lora_rank": 16, "lora_alpha": 2}
    assert found["advisor.do_longer"] == {"epochs": 15}
    assert found["advisor.do_alpha"] == {"lora_alpha": 8}
    full = card(3.9, 600)
    assert "advisor.do_more_rank" in {a.key for a in answered("weak", config)}
    assert "advisor.do_more_rank" not in {a.key for a in answered("weak", config, full)}


def test_overtraining_points_at_the_best_checkpoint() -> None:
    config = TrainConfig(lora_rank=32, max_train_steps=1000)
    found = answered("overtrained", config, best_step=600)
    assert found[0].key == "advisor.do_best_checkpoint"
    assert "600" in found[0].text("en")
    assert {k: v for a in found for k, v in a.changes.items()} == {
        "max_train_steps": 600, "learning_rate": 5e-5, "caption_dropout": 0.1, "lora_rank": 16}
    assert answered("overtrained", config)[0].key == "advisor.do_earlier_checkpoint"


configs = st.builds(
    lambda **k: TrainConfig(**k), batch_size=st.integers(1, 12), lora_rank=st.integers(1, 128),
    lora_alpha=st.none() | st.floats(0.5, 64), epochs=st.integers(1, 300),
    gradient_checkpointing=st.booleans(), base_precision=st.sampled_from(["same", "int8", "nf4"]),
    offload=st.sampled_from([0.0, 0.5, 1.0]), caption_dropout=st.sampled_from([0.0, 0.1]),
    precision=st.sampled_from(["auto", "fp32", "fp16", "bf16"]),
    sample_prompts=st.sampled_from([[], ["a"]]))


@FAST
@given(configs, st.sampled_from(["oom_start", "oom_run", "loss_swings", "weak", "overtrained"]),
       st.floats(1.5, 24), st.booleans())
def test_every_advice_is_a_valid_change_in_words(config: TrainConfig, symptom: str, gb: float,
                                                 planned: bool) -> None:
    for one in answered(symptom, config, card(gb) if planned else None):
        changed = config.with_changes(**one.changes)
        assert bool(one.changes) == (changed != config)
        for lang in i18n.LANGUAGES:
            assert "{" not in one.text(lang)
            assert one.key in i18n.catalogue(lang)
        if symptom.startswith("oom") and one.changes:
            assert changed.batch_size * changed.gradient_accumulation_steps == (
                config.batch_size * config.gradient_accumulation_steps)
            assert one.saves_mb is None or one.saves_mb > 0


def test_unknown_symptom_is_a_fault() -> None:
    with pytest.raises(UserError, match="oom_start"):
        answered("tired", TrainConfig())


# --- real plans ---

def test_suggestion_for_the_demo_base_trains_on_any_cpu(traces: Path, tmp_path: Path) -> None:
    base = plan_inputs.base_of("demo")
    machine = Machine("cpu", "CPU", 4096, 3000)
    found = advisor.suggest(machine, base, None, "style", plan_inputs.BatchPlanner(base, machine))
    assert found.fits
    assert found.values["max_resolution"] == "64,64"
    assert found.values["target_modules"] == "all-linear"
    assert found.plan == plan.plan_run(found.config(), base, found.plan.machine)
    file = tmp_path / "x.yaml"
    file.write_text("\n".join(f"{k}: {v}" for k, v in found.values.items()), "utf-8")
    assert load_train_config(file) == found.config()


@pytest.mark.thorough
def test_sd15_on_small_and_large_cards(traces: Path) -> None:
    """Real shapes: the score rises with the card, and every suggestion fits it with the margin."""
    base = plan_inputs.base_of("sd15")
    cards = [advisor.card_of(gb) for gb in (4, 8, 24)]
    found = [advisor.suggest(card_, base, None, "style", plan_inputs.BatchPlanner(base, card_))
             for card_ in cards]
    assert [one.fits for one in found] == [True, True, True]
    assert sorted(one.score for one in found) == [one.score for one in found]
    for one in found:
        assert one.plan.needs_mb <= one.room_mb * (1 - plan.MARGIN)
        assert one.values["max_resolution"] == "512,512"
        assert one.values["batch_size"] * one.values["gradient_accumulation_steps"] == 8
        assert one.plan.parameters == 2_992_128         # rank 8: attention and feed-forward
    assert found[0].plan.needs_mb < 3 * 1024
    assert NOWHERE.family == base.family
    assert advisor.Shape.of(base, advisor.card_of(4)).parameters == pytest.approx(
        SHAPE.parameters, rel=0.01)


@settings(max_examples=60)
@given(pictures=st.integers(1, 400), repeats=st.integers(1, 10), batch=st.integers(1, 8),
       accumulation=st.integers(1, 4), steps=st.booleans(), length=st.integers(1, 30_000))
def test_a_run_far_too_short_or_long_is_told_with_a_number_that_is_not(
        pictures: int, repeats: int, batch: int, accumulation: int, steps: bool, length: int
        ) -> None:
    """The advised number, taken, is neither."""
    config = TrainConfig.model_validate({
        "batch_size": batch, "gradient_accumulation_steps": accumulation,
        ("max_train_steps" if steps else "epochs"): length})
    told = advisor.length(config, [repeats] * pictures)
    planned = length * (batch * accumulation if steps else pictures * repeats)
    wanted = [advisor.samples(one, pictures, False) for one in advisor.PURPOSES.values()]
    if told is None:
        assert min(wanted) / 2 <= planned <= 2 * max(wanted)
        return
    assert (told.key == "advisor.too_few") == (planned < min(wanted) / 2)
    assert (told.key == "advisor.too_many") == (planned > 2 * max(wanted))
    mended = config.with_changes(**{told.params["key"]: told.params["value"]})
    again = advisor.length(mended, [repeats] * pictures)
    least = (batch * accumulation) if steps else pictures * repeats
    assert again is None or (again.key == "advisor.too_many" and told.params["value"] == 1
                             and least > 2 * max(wanted))


def test_the_readmes_own_config_is_long_enough() -> None:
    for name in ("README.md", "README.zh-CN.md"):
        text = (Path(__file__).parents[2] / name).read_text("utf-8")
        block = next(part for part in text.split("```yaml\n")[1:] if "train_data_dir" in part)
        config = TrainConfig.model_validate(yaml.safe_load(block.split("```")[0]))
        assert advisor.length(config, [1] * 20) is None
        few = advisor.length(config.with_changes(epochs=10), [1] * 20)
        assert few is not None
        assert (few.key, few.params["key"], few.params["value"]) == (
            "advisor.too_few", "epochs", 100)
        assert "`epochs: 100`" in few.text("en")
        from_a_lora = config.with_changes(epochs=10, init_lora_weights="x")
        assert advisor.length(from_a_lora, [1] * 20) is None
        steps = advisor.length(config.with_changes(max_train_steps=100), [1] * 20)
        assert steps is not None
        assert steps.params["value"] == 500     # 2000 pictures at batch 4
