"""One alignment run, from the recorded feedback to a candidate with its evidence.

`align` opens the run, `_carry_out` reads as the run itself, and whatever happens the run is closed with the reason. Nothing
here touches what is served, and nothing reaches the adapters' store before the candidate is trained and evaluated.

How it ends: passed | refused by its gate | not_enough_data | failed | cancelled (SIGINT, SIGTERM, or an operator).
"""

from __future__ import annotations

import json
import traceback
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.choose import (
    Choice,
    DataStatistics,
    Method,
    RewardEvidence,
    choose_method,
    flip_rate_says,
    reward_evidence,
    settled,
    statistics_of,
)
from alignment.config import AlignmentConfig
from alignment.failures import explain
from alignment.gate import Verdict, judge
from alignment.golden import load_golden
from alignment.launch import rank
from alignment.outcome import OUTCOME_EXIT_CODES, Outcome
from alignment.preferences import take_snapshot
from alignment.progress import Interrupted
from alignment.run_progress import RunProgress, check_stop, stages_of, stopping_on_signals
from alignment.run_record import Meter, new_run
from alignment.training_data import may_suffice, parts_short
from alignment.whole_files import whole
from storage import runs
from storage.deployments import served
from storage.errors import Conflict, NotFound, StorageUnavailable
from storage.policies import get_policy
from storage.records import Json, Policy, Run, RunTrigger, Snapshot
from storage.store import Store

if TYPE_CHECKING:
    from alignment.together import Place
    from alignment.work import Work

__all__ = ["OUTCOME_EXIT_CODES", "Outcome", "align", "run_folder", "served_policy"]
METHODS: tuple[Method, ...] = ("dpo", "kto", "ppo")


def align(store: Store, config: AlignmentConfig, *, trigger: RunTrigger = "manual") -> Outcome:
    """Do one run, as process 0 where there are several. It always ends with a recorded outcome unless it never began.

    Raises:
        NotFound: nothing is served yet, so there is no policy to improve.
        Busy: another run is under way.
        InvalidField: the configured golden file is wrong.
    """
    incumbent = served_policy(store)
    if config.evaluation.golden_file and trigger == "manual":
        load_golden(Path(config.evaluation.golden_file))  # who waits for it is told before a run begins
    meter, run = Meter(), new_run(config, trigger=trigger)
    runs.open_run(store, run)
    progress = RunProgress(store, run.id)
    with stopping_on_signals(progress):
        try:
            with _leading(config, progress) as place:
                outcome = _carry_out(store, run, config, incumbent, progress, meter, place)
        except (Interrupted, KeyboardInterrupt) as stop:
            outcome = Outcome(
                status="cancelled", message=f"Cancelled: {stop or 'interrupted'}.", run_id=run.id
            )
        except Exception as error:
            outcome = _failure(store, run, error)
        return _close(store, outcome, progress, meter)


def _leading(
    config: AlignmentConfig, progress: RunProgress
) -> AbstractContextManager[Place] | AbstractContextManager[None]:
    """Lead the other processes, if there are any; alone, torch is not loaded before it is needed."""
    if rank() is None:
        return nullcontext()
    from alignment.together import leading

    return leading(progress, cpu=config.device == "cpu")


def served_policy(store: Store) -> Policy:
    """Return the stable policy.

    Raises:
        NotFound: nothing is served yet.
    """
    now_served = served(store)
    if now_served is None:
        raise NotFound("served policy", None, "start `kotae serve` once, so that a base model is registered")
    return get_policy(store, now_served.stable.policy_id)


def run_folder(store: Store, run_id: str) -> Path:
    """Return where the run keeps its files."""
    return store.data / "runs" / run_id


def _carry_out(
    store: Store,
    run: Run,
    config: AlignmentConfig,
    incumbent: Policy,
    progress: RunProgress,
    meter: Meter,
    place: Place | None,
) -> Outcome:
    """Look at the data, and train and judge a candidate if they allow it."""
    folder = run_folder(store, run.id)
    folder.mkdir(parents=True, exist_ok=True)
    progress.stage("preparing", 3)
    # 1. what has been recorded
    snapshot = take_snapshot(store, run_id=run.id)
    if not may_suffice(snapshot, config.choice, thumbs_train=True):
        return _too_few_labels(snapshot, run, config)
    progress.step(1, f"{sum(snapshot.counts.values())} labels")
    # 2. the served policy, and the labels as its tokens
    from alignment import preparation, together  # torch: only now, so that a run without data ends at once
    from alignment.work import Work

    preparation.check_incumbent(incumbent)
    place = place or together.Place(progress=progress)
    prepared = preparation.prepare(store, snapshot, incumbent, config, progress, place)
    # 3. do the data allow a method?
    corrections = int(snapshot.counts["corrections"])
    statistics = statistics_of(
        prepared.preferences,
        corrections=corrections,
        on_policy_share=prepared.on_policy_share,
        effective_sample_share=prepared.effective_sample_share,
    )
    work = Work(
        store=store,
        run=run,
        config=config,
        folder=folder,
        prepared=prepared,
        progress=progress,
        place=place,
    )
    choice = _choose(work, statistics, reward=None)
    if choice.method is None and not choice.waits_for_reward_model:
        outcome = _not_enough(run, choice, statistics)
    else:
        outcome = _make_candidate(work, statistics, choice, meter)
    return replace(outcome, message=" ".join([outcome.message, *statistics.rater_warnings]))


def _choose(work: Work, statistics: DataStatistics, *, reward: RewardEvidence | None) -> Choice:
    """Apply the rules and keep what they said."""
    config = work.config
    choice = choose_method(statistics, config.choice, wanted=config.method, available=METHODS, reward=reward)
    method = "ppo" if choice.waits_for_reward_model else choice.method
    if method is not None and (
        short := parts_short(work.prepared.parts, method, min_class_thumbs=config.kto.min_class_thumbs)
    ):
        choice = Choice(method=None, rule="0: not enough data", reason=short)
    if choice.method == "dpo" and (flips := flip_rate_says(config, statistics)):
        choice = replace(choice, warnings=(*choice.warnings, flips))
    _keep_choice(work.store, work.run, work.folder, statistics, choice)
    return choice


def _choose_by_reward(work: Work, statistics: DataStatistics, choice: Choice) -> Choice:
    """Train the reward model that PPO would optimise, and choose again with its evidence."""
    from alignment import stages

    scorer = stages.train_scorer(replace(work, config=settled(work.config, choice, statistics)))
    check_stop(work.progress)
    chosen = _choose(work, statistics, reward=reward_evidence(scorer.metrics))
    if chosen.method not in (None, "ppo"):  # other stages than were planned
        work.progress.plan(stages_of(chosen.method, settled(work.config, chosen, statistics), judged=True))
    return chosen


def _not_enough(run: Run, choice: Choice, statistics: DataStatistics) -> Outcome:
    message = f"{choice.reason} (rule {choice.rule})"
    if statistics.dropped:
        message += (
            f" Not usable: {', '.join(f'{count} {reason}' for reason, count in statistics.dropped.items())}."
        )
    return Outcome(status="not_enough_data", message=message, run_id=run.id)


def _make_candidate(work: Work, statistics: DataStatistics, choice: Choice, meter: Meter) -> Outcome:
    """Train, prove and publish; each numbered step is one stage of the run."""
    from alignment import stages

    may_be_ppo = choice.method == "ppo" or choice.waits_for_reward_model
    if may_be_ppo:
        stages.check_room(work)
    work.progress.plan(stages_of(choice.method or "ppo", settled(work.config, choice)))
    # 4. the judge, on labels that the policy does not see
    judging = stages.train_judge(work)
    check_stop(work.progress)
    # 5. the reward model that PPO optimises, which must be another than the judge; it may decide the method
    if may_be_ppo:
        choice = _choose_by_reward(work, statistics, choice)
    if choice.method is None:
        return _not_enough(work.run, choice, statistics)
    # 6. the candidate
    config = work.config
    work = replace(work, config=settled(work.config, choice, statistics))
    trained = stages.update_policy(work, choice.method)
    check_stop(work.progress)
    if trained.held and not trained.moved:
        stages.forget_training(work, choice.method)
        return Outcome(status="refused", message=trained.held, run_id=work.run.id)
    # 7. the evidence
    evidence = stages.evaluate_candidate(work, judging)
    check_stop(work.progress)
    # 8. the gate
    verdict = judge(evidence.numbers, work.config.gate)
    # 9. the report, and then the candidate becomes known, with its evidence
    work.progress.stage("report", 1)
    candidate = stages.name_candidate(work)
    cost = meter.cost(stage_seconds=work.progress.stage_seconds)
    stages.write_report(
        work,
        candidate,
        statistics=statistics,
        choice=choice,
        trained=trained,
        evidence=evidence,
        verdict=verdict,
        cost=cost,
    )
    stages.publish(work, candidate, evidence, verdict)
    stages.forget_training(work, choice.method)
    work.progress.step(1)
    outcome = _judged(work.run, candidate, verdict)
    flips = flip_rate_says(config, statistics) if choice.method == "dpo" else ""
    told = (outcome.message, stages.stopped_says(trained), trained.held, flips)
    return replace(outcome, message=" ".join(filter(None, told)))


def _judged(run: Run, candidate: Policy, verdict: Verdict) -> Outcome:
    wins = verdict.numbers["win_rate_length_controlled"]
    rate = f"win rate {wins['value']:.0%} ({wins['low']:.0%} to {wins['high']:.0%})"
    if verdict.passed:
        message = f"{candidate.id} passed its gate: {rate} against the served policy. It waits for approval."
        return Outcome(status="passed", message=message, run_id=run.id, policy_id=candidate.id)
    return Outcome(
        status="refused",
        message=f"The gate refused {candidate.id} ({rate}). "
        + " ".join(f"{text}." for text in verdict.reasons),
        run_id=run.id,
        policy_id=candidate.id,
        reasons=tuple(verdict.reasons),
    )


def _too_few_labels(snapshot: Snapshot, run: Run, config: AlignmentConfig) -> Outcome:
    """End before the model is loaded: not even if every label were usable would there be enough."""
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(snapshot.counts.items()))
    needed = config.choice
    message = (
        f"{counts} are too few: collect {needed.min_pairs} comparisons, {needed.min_corrections} corrections or "
        f"{needed.min_thumbs} thumbs (rule 0: not enough data)"
    )
    return Outcome(status="not_enough_data", message=message, run_id=run.id)


def _keep_choice(store: Store, run: Run, folder: Path, statistics: DataStatistics, choice: Choice) -> None:
    """Keep the statistics and the rule with the run: as a file, and as numbers beside its curves."""
    plain = statistics.as_json()
    with whole(folder / "choice.json") as aside:
        aside.write_text(json.dumps({"data": plain, "choice": asdict(choice)}, indent=2))
    numbers = {
        f"data/{name}": float(value) for name, value in plain.items() if isinstance(value, int | float)
    }
    if statistics.agreement is not None:
        numbers["data/agreement"] = statistics.agreement.value
    runs.record_metrics(store, run.id, step=0, metrics=numbers)


def _failure(store: Store, run: Run, error: Exception) -> Outcome:
    """Describe what went wrong: a person's message for known errors; the traceback goes to the run's folder."""
    folder = run_folder(store, run.id)
    with suppress(OSError):  # the disk may be what failed; the message below is stored with the run
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / "error.txt") as aside:
            aside.write_text("".join(traceback.format_exception(error)))
    message = f"{explain(error, store.data)} (details: {folder / 'error.txt'})"
    return Outcome(status="failed", message=message, run_id=run.id)


def _close(store: Store, outcome: Outcome, progress: RunProgress, meter: Meter) -> Outcome:
    """Record the end; a run that somebody else closed meanwhile stays as they left it.

    Where the end cannot be recorded, the next start marks the run as failed.
    """
    try:
        progress.flush()
        cost: Json = meter.cost(stage_seconds=progress.stage_seconds)
        runs.close_run(store, outcome.run_id, status=outcome.status, message=outcome.message, cost=cost)
    except Conflict:
        ended = runs.get_run(store, outcome.run_id)
        return Outcome(status=ended.status, message=ended.message, run_id=ended.id)
    except StorageUnavailable as error:
        message = f"{outcome.message} The end of the run could not be recorded: {explain(error, store.data)}"
        return replace(outcome, status="failed", message=message)
    return outcome
