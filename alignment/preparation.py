"""What a run does before it knows its method: it checks what is served, loads it, and reads the labels as its tokens."""

from __future__ import annotations

from alignment.config import AlignmentConfig
from alignment.golden import golden_questions
from alignment.memory import longest
from alignment.models import Base, answer_ids
from alignment.preferences import Preferences, load_preferences, newest_label_at
from alignment.questions import recent_turns, unlabelled_prompts
from alignment.reward_raters import weighed_by_others
from alignment.run_progress import RunProgress, check_stop
from alignment.sample_share import measured_share
from alignment.together import Place, load, plan_together
from alignment.training_data import divide, longest_answer, on_policy_share, prompts_of, recent_policies
from alignment.warm_start import former_judge
from alignment.work import Prepared
from storage.adapters import verify_adapter
from storage.digests import base_digest
from storage.errors import CorruptData
from storage.records import Policy, Snapshot
from storage.store import Store


def check_incumbent(incumbent: Policy) -> None:
    """Check that the bytes on disk are those that are served.

    Raises:
        CorruptData: the base or the adapter was changed.
        NotFound: the base's folder is gone.
    """
    found = base_digest(incumbent.base_path)
    if found != incumbent.base_sha256:
        raise CorruptData(
            f"the base model in {incumbent.base_path} is no longer the one that is served "
            f"({found[:8]}, not {incumbent.base_sha256[:8]}); restart the server with it"
        )
    if incumbent.adapter_path is not None and incumbent.adapter_sha256 is not None:
        verify_adapter(incumbent.adapter_path, incumbent.adapter_sha256)


def prepare(
    store: Store,
    snapshot: Snapshot,
    incumbent: Policy,
    config: AlignmentConfig,
    progress: RunProgress,
    place: Place,
) -> Prepared:
    """Load the model in every process, and read the labels as its tokens.

    Raises:
        CorruptData: the served adapter's weights are not finite.
        InvalidField: the golden file is wrong.
        DoesNotFit: the largest prompt with its answers is too large for a device.
    """
    base = place.together(load, incumbent, config)
    progress.step(2, "model loaded")
    preferences = load_preferences(
        store,
        snapshot,
        tokenize=lambda text, served: answer_ids(base, text, served=served),
        max_tokens=min(config.data.max_tokens, base.max_positions),
        base_sha256=incumbent.base_sha256,
        weigh=lambda labels: _planned_and_weighed(place, labels, config, progress),
    )
    check_stop(progress)
    former = former_judge(store, config.reward, base_sha256=incumbent.base_sha256)
    parts = divide(preferences, config.data, seed=config.seed)
    prepared = Prepared(
        base=base,
        incumbent=incumbent,
        preferences=preferences,
        parts=parts.unseen_by(former.seen_prompts) if former else parts,
        on_policy_share=on_policy_share(store, preferences, recent_policies(store, incumbent, config)),
        effective_sample_share=measured_share(store, base, preferences, incumbent, config, progress=progress),
        former=former,
        golden=golden_questions(config.evaluation.golden_file, base_sha256=incumbent.base_sha256),
        unlabelled=unlabelled_prompts(
            recent_turns(store, base_sha256=incumbent.base_sha256),
            labelled=prompts_of(preferences).union(former.seen_prompts if former else ()),
            until=newest_label_at(store, snapshot),
            longest_prompt=_room_for_questions(base, preferences, config),
        ),
    )
    progress.step(3, f"{len(preferences.pairs)} pairs, {len(preferences.thumbs)} thumbs")
    return prepared


def _room_for_questions(base: Base, labels: Preferences, config: AlignmentConfig) -> int:
    """Return the tokens that a question without a label may have: with an answer as long as the longest labelled one, which
    is how long the policy's own may become, it is no longer than a label may be."""
    return min(base.max_positions // 2, config.data.max_tokens - longest_answer(labels))


def _planned_and_weighed(
    place: Place, labels: Preferences, config: AlignmentConfig, progress: RunProgress
) -> Preferences:
    """Weigh the labels by their raters, which trains already: what fits is planned before."""
    base = place.base
    assert base is not None
    place.together(plan_together, longest(base, labels))
    return weighed_by_others(base, labels, config.reward, seed=config.seed, progress=progress)
