"""The stages of a run that `alignment.pipeline` puts in order: each takes what the ones before made."""

from __future__ import annotations

from contextlib import AbstractContextManager, closing, nullcontext

from alignment.choose import Choice, DataStatistics, Method
from alignment.evaluation import Evidence, Trial, evaluate
from alignment.fixed_questions import FixedQuestions
from alignment.gate import Verdict
from alignment.memory import longest
from alignment.models import adapter_parameters, save_adapter
from alignment.preferences import Preferences
from alignment.probe_record import record_probes
from alignment.questions import choose_questions, recent_turns, served_sampling
from alignment.reference_cache import ReferenceCache, reference_identity
from alignment.report import Card, write_card
from alignment.resume import Kept, Trained, keep_trained, kept_by, read_trained
from alignment.reward_model import TrainedReward
from alignment.rollout_server import ServedRollouts
from alignment.safety import load_suite
from alignment.together import (
    load_scorer,
    plan_together,
    put_policy,
    shape_policy,
    train_policy_by,
    train_ranked_reward,
    train_reward,
)
from alignment.training import copy_weights
from alignment.training_data import prompts_in
from alignment.warm_start import Former
from alignment.whole_files import remove, whole
from alignment.work import Work
from storage import policies, runs, settings
from storage.adapters import import_adapter
from storage.digests import file_sha256, sha256_of
from storage.errors import InvalidField, KotaeError
from storage.probes import write_probes
from storage.records import Evaluation, Json, Policy, RewardModel, new_id, now


class TrainingStopped(KotaeError):
    """The training stopped itself: its numbers left what can be trusted."""


def train_judge(work: Work) -> TrainedReward:
    """Train the judge on its half of the labels and keep it.

    Raises:
        TrainingStopped: its numbers were not finite.
        Interrupted: the run was stopped.
    """
    former = work.prepared.former
    scorer = _reward_model(work, work.prepared.parts.judge, seed=work.config.seed, former=former)
    target = work.folder / "reward_model"
    with whole(target) as aside:
        scorer.save(aside)
    files = {str(f.relative_to(target)): file_sha256(f) for f in sorted(target.rglob("*")) if f.is_file()}
    record = RewardModel(
        id=new_id("reward"),
        run_id=work.run.id,
        sha256=sha256_of(files),
        path=str(target.absolute()),
        metrics={**scorer.metrics, **({"start_from": former.id} if former else {})},
        created_at=now(),
    )
    runs.add_reward_model(work.store, record)
    return scorer


def train_scorer(work: Work) -> TrainedReward:
    """Train the reward model that PPO optimises, on the policy's part of the labels or on answers that a fit to those ranks,
    as is settled by now; an interrupted run's is taken again.

    Raises:
        TrainingStopped: its numbers were not finite.
        Interrupted: the run was stopped.
    """
    kept = _kept(work, "ppo")
    if kept.scorer.is_dir():
        return work.place.together(load_scorer, kept.scorer)
    scorer = _scorer(work)
    remove(kept.checkpoint)  # of a training on another one
    with whole(kept.scorer) as aside:
        scorer.save(aside)
    return scorer


def _scorer(work: Work) -> TrainedReward:
    labels, seed = work.prepared.parts.policy, work.config.seed + 1
    if work.config.ppo.reward_from == "labels":
        return _reward_model(work, labels, seed=seed)
    held_out, unlabelled = work.prepared.parts.held_out, work.prepared.unlabelled
    return _finite(work.place.together(train_ranked_reward, labels, held_out, unlabelled, work.config, seed))


def _reward_model(
    work: Work, labels: Preferences, *, seed: int, former: Former | None = None
) -> TrainedReward:
    held_out, start = work.prepared.parts.held_out, former.folder if former else None
    return _finite(work.place.together(train_reward, labels, held_out, work.config.reward, seed, start))


def _finite(scorer: TrainedReward) -> TrainedReward:
    if scorer.stopped_because:
        raise TrainingStopped(
            f"the reward model's training stopped: {scorer.stopped_because}; lower reward.learning_rate"
        )
    return scorer


def update_policy(work: Work, method: Method) -> Trained:
    """Train the adapter "policy" and write it to the run's folder; interrupted training of the same data goes on.

    PPO optimises the latest reward model. Where it stops itself, the last policy whose answers were fine is evaluated as any
    other: the gate decides.

    Raises:
        TrainingStopped: it stopped itself, and PPO before it had improved; the last good adapter is in the run's folder.
        Interrupted: the run was stopped; the checkpoint is kept.
    """
    kept, base, adapter = _kept(work, method), work.prepared.base, work.folder / "adapter"
    work.place.together(shape_policy, method, work.config)
    # the shape may be another, and the plan in force that of PPO's reward model
    work.place.together(plan_together, longest(base, work.prepared.preferences))
    found = read_trained(kept, method)
    if found is not None:
        weights, result = found
        work.place.together(put_policy, weights)
    else:
        result = _trained(work, method, kept)
    with whole(adapter) as aside:
        save_adapter(base, "policy", aside)
    if result.stopped_because and not (method == "ppo" and result.moved):
        kept.forget()
        raise TrainingStopped(
            f"training stopped itself after {result.steps} steps: {result.stopped_because}. The last good adapter "
            f"is in {adapter}; lower {method}.learning_rate or raise {method}.beta"
        )
    if found is None:
        keep_trained(kept, copy_weights(adapter_parameters(base, "policy")), result)
    return result


def stopped_says(trained: Trained) -> str:
    """Return, for people, why the training ended itself, "" where it did not."""
    if not trained.stopped_because:
        return ""
    return (
        f"Training stopped itself after {trained.steps} steps: {trained.stopped_because}. The candidate is the last policy "
        "before that whose answers were fine; the training's numbers are those of the one that was given up."
    )


def forget_training(work: Work, method: Method) -> None:
    """Drop what was kept for a run that goes on: this one is done."""
    _kept(work, method).forget()


def _kept(work: Work, method: Method) -> Kept:
    return kept_by(
        work.store.data,
        method,
        incumbent=work.prepared.incumbent,
        config=work.config,
        parts=work.prepared.parts,
        unlabelled=list(work.prepared.unlabelled),
    )


def _trained(work: Work, method: Method, kept: Kept) -> Trained:
    incumbent = work.prepared.incumbent
    identity = reference_identity(
        work.prepared.base, base_sha256=incumbent.base_sha256, reference_sha256=incumbent.adapter_sha256
    )
    cache = ReferenceCache(work.store.data / "cache", identity=identity)
    labels, prompts, ppo = work.prepared.parts.policy, _prompts(work), work.config.ppo
    if method == "ppo":
        room = max(map(len, prompts), default=0) + ppo.max_new_tokens
        work.place.together(plan_together, ppo.answers_per_prompt * room, ppo)
    with _rollout_server(work, method) as sampler:
        return work.place.together(
            train_policy_by,
            method,
            labels,
            prompts,
            _unseen(work),
            work.prepared.unlabelled,
            work.config,
            cache=cache,
            kept=kept,
            sampler=sampler,
        )


def _rollout_server(work: Work, method: Method) -> AbstractContextManager[ServedRollouts | None]:
    """Return the server that answers for the policy while PPO trains it, None without one."""
    url = work.config.ppo.rollout_url
    if method != "ppo" or not url:
        return nullcontext()
    return closing(ServedRollouts(url, folder=work.folder / "rollouts", name=new_id("rollouts")))


def check_room(work: Work) -> None:
    """Check that PPO has questions to answer, before anything is trained for it.

    Raises:
        InvalidField: with an answer none fits into the model's context.
    """
    if not _prompts(work):
        most = work.prepared.base.max_positions
        fix = f"lower it: with an answer of so many tokens no question fits into the model's {most} tokens"
        raise InvalidField("ppo.max_new_tokens", work.config.ppo.max_new_tokens, fix)


def _prompts(work: Work) -> list[tuple[int, ...]]:
    """Return the prompts of the policy's part of the labels that leave room for an answer: PPO answers them itself."""
    room = work.prepared.base.max_positions - work.config.ppo.max_new_tokens
    return [prompt for prompt in prompts_in(work.prepared.parts.policy) if len(prompt) <= room]


def _unseen(work: Work) -> list[tuple[int, ...]]:
    """Return the prompts of the judge's part: the policy does not learn from them, and it is not evaluated on them."""
    return list(prompts_in(work.prepared.parts.judge))


def evaluate_candidate(work: Work, scorer: TrainedReward) -> Evidence:
    """Gather the questions and compare the candidate with the incumbent on them."""
    base, incumbent, config = work.prepared.base, work.prepared.incumbent, work.config
    turns = recent_turns(work.store, base_sha256=incumbent.base_sha256)
    sampling = served_sampling(turns)
    room = min(sampling.max_tokens, config.evaluation.max_new_tokens, base.max_positions // 2)
    questions = choose_questions(
        turns,
        held_out=work.prepared.parts.held_out,
        learnt=work.prepared.parts.learnt_prompts().union(
            work.prepared.unlabelled.values(), scorer.seen_prompts
        ),
        config=config.evaluation,
        longest_prompt=base.max_positions - room,
        seed=config.seed,
    )
    trial = Trial(
        base=base,
        judge=scorer,
        questions=questions,
        sampling=sampling,
        held_out=work.prepared.parts.held_out,
        people=work.prepared.preferences.pairs,
        fixed=FixedQuestions(
            golden=work.prepared.golden,
            suite=load_suite(),
            system_prompt=str(settings.get(work.store, "system_prompt", "")),
        ),
        config=config.evaluation,
        seed=config.seed,
    )
    return evaluate(trial, work.progress)


def name_candidate(work: Work) -> Policy:
    """Copy the adapter, with what it answers to the probes, to its final place and name it.

    Nobody knows of it before `publish`.
    """
    adapter = work.folder / "adapter"
    write_probes(adapter, record_probes(work.prepared.base, adapter="policy"))
    stored = import_adapter(work.store.data, adapter)
    incumbent = work.prepared.incumbent
    return Policy(
        id=policies.new_policy_id(work.store),
        base_path=incumbent.base_path,
        base_sha256=incumbent.base_sha256,
        adapter_path=str(stored.path),
        adapter_sha256=stored.sha256,
        parent_id=incumbent.id,
        run_id=work.run.id,
        created_at=now(),
    )


def publish(work: Work, candidate: Policy, evidence: Evidence, verdict: Verdict) -> None:
    """Make the candidate and its evidence known; a candidate without evidence could not be approved."""
    evaluation = Evaluation(
        id=new_id("evaluation"),
        run_id=work.run.id,
        policy_id=candidate.id,
        incumbent_id=work.prepared.incumbent.id,
        numbers=verdict.numbers,
        samples=evidence.samples,
        passed=verdict.passed,
        reasons=verdict.reasons,
        created_at=now(),
    )
    policies.add_policy(work.store, candidate, evaluation)


def write_report(
    work: Work,
    candidate: Policy,
    *,
    statistics: DataStatistics,
    choice: Choice,
    trained: Trained,
    evidence: Evidence,
    verdict: Verdict,
    cost: Json,
) -> None:
    """Write the model card and the plots of the candidate."""
    card = Card(
        run=work.run,
        policy_id=candidate.id,
        incumbent=work.prepared.incumbent,
        statistics=statistics,
        choice=choice,
        training={"steps": trained.steps, **trained.metrics},
        stopped=stopped_says(trained),
        held=trained.held,
        learnt_from=trained.learnt_from,
        verdict=verdict,
        samples=evidence.samples,
        details=evidence.details,
        config=work.config,
        cost=cost,
        curves=runs.metrics(work.store, work.run.id),
    )
    write_card(card, work.folder)
