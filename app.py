"""Kotae's command line and composition root: the only place that knows every part.

Each command is a function that takes the parsed arguments and returns an exit code: 0 done, 2 bad input
(the message names field, value and fix), and for `align` 3 the gate refused, 4 not enough data, 1 failed.
Heavy packages (torch, gradio) are imported inside the command that needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from assistant.admission import Limits
from storage import audit, deployments, people, policies, runs
from storage.errors import KotaeError, NotFound
from storage.records import ROLES, Person
from storage.store import Store

STARTER = Path(__file__).parent / "alignment" / "starter" / "checkpoint"
Command = Callable[[argparse.Namespace], int]


# -- serving and learning ---------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> int:
    """Web, API, scheduler and engine, until Ctrl-C."""
    from assistant.server import ServeOptions, serve_until_stopped

    options = ServeOptions(
        data=args.data,
        model=args.model or str(STARTER),
        engine=args.engine,
        engine_urls=tuple(args.engine_url or ()),
        host=args.host,
        port=args.port,
        behind_https=args.behind_https,
        limits=Limits(
            everybody=args.max_answers, one_person=args.max_answers_each, shadow_below=args.shadow_below
        ),
        probe_tolerance_nats=args.probe_tolerance,
        gpu_memory_share=args.gpu_memory_share,
        align_command=(sys.executable, str(Path(__file__).resolve()), "align", "--data", str(args.data)),
    )
    from alignment.schedule import Scheduler

    return serve_until_stopped(options, make_scheduler=Scheduler)


def align(args: argparse.Namespace) -> int:
    """Run one alignment now, in this process or in those of the configured launcher."""
    from alignment import launch
    from alignment.config import load_config
    from alignment.pipeline import align as run_alignment

    config = load_config(args.config)
    if args.method is not None:
        config = replace(config, method=args.method)
    launch.give_way()
    rank = launch.rank()
    several = rank is not None or bool(config.launcher)
    config = replace(config, shard_base=launch.shards_base(config.shard_base, several=several))
    if rank:
        from alignment.together import follow

        return follow(cpu=config.device == "cpu")
    store = Store(args.data)
    if config.launcher and rank is None:
        outcome = launch.launch(store, config.launcher, again(args))
    else:
        outcome = run_alignment(store, config, trigger=args.trigger)
    show(args, asdict(outcome), "\n".join([outcome.message, *outcome.reasons]))
    if rank is None:
        return outcome.exit_code
    return int(outcome.status == "failed")  # a launcher takes any other code for a crash too


def again(args: argparse.Namespace) -> list[str]:
    """Return the command that does what `align` was asked for."""
    options = {
        "--data": args.data,
        "--trigger": args.trigger,
        "--method": args.method,
        "--config": args.config,
    }
    given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    return [str(Path(__file__).resolve()), "align", *given]


# -- looking ----------------------------------------------------------------------------------------------


def status(args: argparse.Namespace) -> int:
    """What is served, waiting and running."""
    from assistant.in_effect import noted_waiting
    from assistant.shadow_watch import shadow_status

    store = Store(args.data)
    served, running = deployments.served(store), runs.running(store)
    canary = served.canary if served else None
    waiting = [p.id for p in policies.list_policies(store) if policies.standing(store, p.id) == "candidate"]
    facts = {
        "stable": served.stable.policy_id if served else None,
        "previous": served.previous.policy_id if served and served.previous else None,
        "canary": {"policy": canary.policy_id, "share": canary.share} if canary else None,
        "shadow": shadow_status(store),
        "not_answering_yet": [asdict(row) for row in noted_waiting(store)],
        "waiting_for_decision": waiting,
        "running": {"id": running.id, **running.progress} if running else None,
    }
    show(
        args, facts, "\n".join(f"{name.replace('_', ' '):22}{value or '-'}" for name, value in facts.items())
    )
    return 0


def list_policies(args: argparse.Namespace) -> int:
    """Every policy with its standing."""
    from assistant.quarantine import listed

    rows = listed(Store(args.data))
    lines = [f"{row['id']:24}{row['standing']:12}{row['quarantined'] or row['run_id'] or ''}" for row in rows]
    show(args, rows, "\n".join(lines))
    return 0


def list_runs(args: argparse.Namespace) -> int:
    """Every alignment run with its outcome."""
    store = Store(args.data)
    rows = [asdict(run) for run in runs.list_runs(store)]
    show(args, rows, "\n".join(f"{row['id']:32}{row['status']:18}{row['message']}" for row in rows))
    return 0


def audit_command(args: argparse.Namespace) -> int:
    """Check the hash chain over everything that changed."""
    report = audit.verify(Store(args.data))
    show(args, asdict(report), report.message)
    return 0 if report.ok else 1


# -- release decisions ------------------------------------------------------------------------------------


def approve(args: argparse.Namespace) -> int:
    """Approve a candidate and serve it: to everybody, to a share, or to nobody as the shadow."""
    from assistant import release

    store = Store(args.data)
    row = release.approve(
        store,
        policy_id=args.policy,
        person=acting(store, args),
        reason=args.reason,
        canary_percent=args.canary,
        shadow_percent=args.shadow,
    )
    show(args, asdict(row), f"{row.policy_id} is approved as {row.role}, share {row.share:.0%}")
    return 0


def reject(args: argparse.Namespace) -> int:
    """Reject a policy for good; a canary or shadow is withdrawn with it."""
    from assistant import release

    store = Store(args.data)
    release.reject(store, policy_id=args.policy, person=acting(store, args), reason=args.reason)
    standing = policies.standing(store, args.policy)
    show(args, {"policy_id": args.policy, "standing": standing}, f"{args.policy} is {standing}")
    return 0


def promote(args: argparse.Namespace) -> int:
    """Give the canary all conversations."""
    from assistant import release

    store = Store(args.data)
    row = release.promote(store, policy_id=args.policy, person=acting(store, args), reason=args.reason)
    show(args, asdict(row), f"{row.policy_id} now answers everybody")
    return 0


def rollback(args: argparse.Namespace) -> int:
    """Withdraw the canary, or go back to the policy before; with --shadow withdraw the shadow."""
    from assistant import release

    store = Store(args.data)
    person = acting(store, args)
    people.require(person, "operator")
    take_back = release.withdraw if args.shadow else release.rollback
    row = take_back(store, actor=person.id, reason=args.reason, expected=args.policy)
    show(
        args,
        asdict(row),
        f"{row.policy_id} is {row.role} again" if row.role == "stable" else f"{row.policy_id} is withdrawn",
    )
    return 0


def acting(store: Store, args: argparse.Namespace) -> Person:
    """Return the person named by --as."""
    return existing_person(store, "--as", args.actor)


def existing_person(store: Store, field: str, name: str) -> Person:
    """Return the person of that name; raises NotFound naming the field."""
    person = people.person_named(store, name)
    if person is None:
        known = ", ".join(sorted(one.name for one in people.list_people(store))) or "nobody yet"
        raise NotFound(field, name, f"name one of: {known}")
    return person


# -- people -----------------------------------------------------------------------------------------------


def users_add(args: argparse.Namespace) -> int:
    """Add a person; prints a one-time password."""
    from assistant.accounts import invite

    person, password = invite(Store(args.data), name=args.name, role=args.role, actor="system")
    facts = {"id": person.id, "name": person.name, "role": person.role, "password": password}
    show(args, facts, f"{person.name} ({person.role}) may sign in with the one-time password {password}")
    return 0


def users_token(args: argparse.Namespace) -> int:
    """Give a person a new API token; it is shown once."""
    store = Store(args.data)
    person = existing_person(store, "NAME", args.name)
    token = people.issue_token(store, person_id=person.id, label=args.label, actor="system")
    show(args, {"name": person.name, "token": token}, token)
    return 0


# -- demo -------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> int:
    """Simulated staff use the assistant, then one alignment runs."""
    from alignment.starter.customers import questions
    from assistant.demo import DemoOptions, run_demo

    options = DemoOptions(
        data=args.data,
        port=args.port,
        comparisons=args.comparisons,
        command=(sys.executable, str(Path(__file__).resolve())),
        questions=tuple(one.text for one in questions(args.comparisons, seed=args.seed)),
        seed=args.seed,
    )
    return run_demo(options)


# -- the command line -------------------------------------------------------------------------------------


def show(args: argparse.Namespace, facts: Any, text: str) -> None:
    """Print facts as JSON with --json, else the text for a person."""
    print(json.dumps(facts, ensure_ascii=False, indent=2, default=str) if args.json else text)


def parser() -> argparse.ArgumentParser:
    """Return the whole command line."""
    top = argparse.ArgumentParser(prog="kotae", description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(_command(commands, "serve", serve))
    one = _command(commands, "align", align)
    one.add_argument(
        "--method", choices=("auto", "dpo", "ppo", "kto"), help="default: the configuration's, auto"
    )
    one.add_argument("--config", type=Path, help="TOML file, see docs/alignment.md")
    triggers = ("manual", "cron", "labels")
    one.add_argument("--trigger", default="manual", choices=triggers, help=argparse.SUPPRESS)
    for name, look in (("status", status), ("policies", list_policies), ("runs", list_runs)):
        _command(commands, name, look)
    _add_decisions(commands)
    _add_users(commands.add_parser("users", help="accounts and API tokens"))
    audits = commands.add_parser("audit", help="the audit log").add_subparsers(
        required=True, metavar="ACTION"
    )
    _command(audits, "verify", audit_command)
    one = _command(commands, "demo", demo)
    one.add_argument("--port", type=int, default=7860, help="of the assistant; started if none answers there")
    one.add_argument("--comparisons", type=int, default=400, help="to be made (400); a run needs about 330")
    one.add_argument("--seed", type=int, default=0)
    return top


def _command(parent: Any, name: str, run: Command) -> argparse.ArgumentParser:
    help_text = (run.__doc__ or "").strip()
    added: argparse.ArgumentParser = parent.add_parser(name, help=help_text, description=help_text)
    added.add_argument("--data", type=Path, default=data_folder(), help="data folder (default: %(default)s)")
    added.add_argument("--json", action="store_true", help="print facts as JSON")
    added.set_defaults(run=run)
    return added


def _add_serve(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--model", metavar="PATH_OR_ID", help="a Hugging Face chat model (default: the starter model)"
    )
    one.add_argument("--engine", default="auto", choices=("auto", "vllm", "local"))
    one.add_argument(
        "--engine-url", action="append", metavar="URL", help="a vLLM run elsewhere; repeat for replicas"
    )
    one.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    one.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    one.add_argument("--behind-https", action="store_true", help="a TLS proxy stands in front of this server")
    limits, words = (
        Limits(),
        "answers under way at once, %s; more are told to come back (default: %%(default)s)",
    )
    one.add_argument(
        "--max-answers", type=int, default=limits.everybody, metavar="N", help=words % "of everybody"
    )
    one.add_argument(
        "--max-answers-each", type=int, default=limits.one_person, metavar="N", help=words % "of one person"
    )
    one.add_argument(
        "--probe-tolerance",
        type=float,
        metavar="NATS",
        help="most that the engine's log-probs of a new policy's probes may differ from the trainer's "
        "(default: 0.001 where both are known to compute in float32, else 0.25)",
    )
    one.add_argument(
        "--gpu-memory-share",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of a GPU's memory, for vLLM (default: %(default)s; a run on the same card takes 0.45)",
    )
    one.add_argument(
        "--shadow-below",
        type=int,
        default=limits.shadow_below,
        metavar="N",
        help="the shadow is asked while fewer answers are under way than this (default: %(default)s)",
    )


def _add_decisions(commands: Any) -> None:
    for name, run in (("approve", approve), ("reject", reject), ("promote", promote), ("rollback", rollback)):
        one = _command(commands, name, run)
        back = name == "rollback"
        what = "this and no other (default: the newest that answers)" if back else "as printed by `policies`"
        one.add_argument("policy", metavar="POLICY", nargs="?" if back else None, help=what)
        one.add_argument("--as", dest="actor", required=True, metavar="USER", help="who decides")
        one.add_argument("--reason", required=True, help="kept in the audit log")
        if name == "approve":
            share = one.add_mutually_exclusive_group()
            share.add_argument(
                "--canary", type=float, metavar="PERCENT", help="only this share of conversations"
            )
            asked = "asked the questions of this share too, its answers shown to nobody"
            share.add_argument("--shadow", type=float, metavar="PERCENT", help=asked)
        if back:
            one.add_argument("--shadow", action="store_true", help="the shadow, and nothing that answers")


def _add_users(users: argparse.ArgumentParser) -> None:
    actions = users.add_subparsers(required=True, metavar="ACTION")
    one = _command(actions, "add", users_add)
    one.add_argument("name", metavar="NAME")
    one.add_argument("--role", required=True, choices=ROLES)
    one = _command(actions, "token", users_token)
    one.add_argument("name", metavar="NAME")
    one.add_argument("--label", default="command line", help="what the token is for")


def data_folder() -> Path:
    """Return KOTAE_DATA or `data` under the current folder."""
    return Path(os.environ.get("KOTAE_DATA", "data"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "serve")
    args = parser().parse_args(arguments)
    args.data = args.data.resolve()
    try:
        return int(args.run(args))
    except KotaeError as error:
        print(f"kotae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
