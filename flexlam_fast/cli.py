"""The command line: ``flexlam-fast`` and ``python -m flexlam_fast``.

Each command is a function with typed arguments, imported when it is called: help and complaints come at once.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flexlam_fast.errors import FlexLAMError, InputError
from flexlam_fast.terminal import check_streams, guarded_output, say

PROGRAM = "flexlam-fast"


class Command(NamedTuple):
    """Where a command's function is, and its line in the overview; an empty ``function`` means a module of several."""

    module: str
    function: str
    help: str


COMMANDS = {
    "demo": Command(
        "flexlam_fast.evaluate.demo", "demo", "play the shipped checkpoint at several budgets, write a report"
    ),
    "doctor": Command("flexlam_fast.doctor", "doctor", "what this machine has, and which backend it takes"),
    "collect": Command("flexlam_fast.cli", "collect", "film the scripted experts of ViZDoom scenarios"),
    "pack": Command("flexlam_fast.cli", "pack", "pack a folder of videos into episodes"),
    "train": Command(
        "flexlam_fast.train.commands",
        "",
        "train a stage (lam, sequence, translator, joint) or all, or join them as a policy",
    ),
    "rollout": Command("flexlam_fast.cli", "play", "play scenarios at several budgets beside random and expert"),
    "reconstruct": Command("flexlam_fast.cli", "reconstruct", "decode held-out transitions at several budgets"),
    "probe": Command("flexlam_fast.cli", "probe", "what the codes of a LAM know: pictures, actions, usage, a verdict"),
}
TRAIN = {
    "lam": "lam",
    "sequence": "sequence",
    "translator": "translator",
    "joint": "joint",
    "all": "all_stages",
    "policy": "policy",
}


def collect(
    output: Path,
    *,
    scenarios: tuple[str, ...] = ("my_way_home", "health_gathering", "defend_the_center", "take_cover"),
    steps: tuple[int, ...] = (20_000,),
    seed: int = 0,
    noise: float = 0.1,
    test_fraction: float = 0.1,
    workers: int = 2,
    size: int = 64,
    overwrite: bool = False,
) -> None:
    """Play ViZDoom scenarios with their scripted experts and write packed episodes.

    Args:
        output: the directory to make.
        scenarios: what to play.
        steps: transitions of the train split, one number for all scenarios or one for each.
        seed: 0 to 999; the same seed gives the same bytes.
        noise: share of the decisions that random bursts take over, 0 to 1.
        test_fraction: share of the episodes that form the test split, 0 to 0.5.
        workers: processes that play, 1 to 1024.
        size: side of the square frames in pixels, 8 to 120; a model takes frames of its own size.
        overwrite: replace a data set that is there.
    """
    from flexlam_fast.data.collect import collect as run

    options: dict[str, Any] = {"noise": noise, "test_fraction": test_fraction, "workers": workers, "size": size}
    _told(run(output, scenarios, steps=steps, seed=seed, overwrite=overwrite, **options))


def pack(
    videos: Path,
    output: Path,
    *,
    fps: float | None = None,
    size: int = 64,
    test_fraction: float = 0.1,
    on_error: Literal["stop", "skip"] = "stop",
    strict: bool = False,
    overwrite: bool = False,
) -> None:
    """Decode every video below a folder and write it as an episode without actions.

    Pictures are turned, mirrored, stretched and deinterlaced as the files say. Of a damaged video the undamaged frames
    are packed, as one episode before and one after what is missing, and a warning tells the numbers. A pack that was
    stopped, however it was, goes on where it was when the same command is given again.

    Args:
        videos: the folder, searched through all its subfolders.
        output: the directory to make.
        fps: frames per second to keep; left out, all.
        size: side of the square frames in pixels, 1 to 4096.
        test_fraction: share of the videos that form the test split, 0 to 0.5.
        on_error: what to do at a video that cannot be opened or gives fewer than two frames.
        strict: make every warning about a video an error.
        overwrite: replace a data set that is there.
    """
    from flexlam_fast.data.video import pack as run

    options: dict[str, Any] = {"on_error": on_error, "strict": strict, "overwrite": overwrite}
    _told(run(videos, output, fps=fps, size=size, test_fraction=test_fraction, **options))


def play(
    path: str = "",
    /,
    *,
    checkpoint: str = "",
    scenarios: tuple[str, ...] = ("my_way_home", "health_gathering"),
    budgets: tuple[int, ...] | None = None,
    episodes: int = 50,
    seed: int = 0,
    sessions: int = 1,
    output: Path = Path("out/rollout"),
    device: str = "auto",
    dtype: str = "float32",
    backend: str = "auto",
) -> None:
    """Play scenarios at several budgets, and the same episodes at random and with the scripted expert.

    Args:
        path: a policy, a run that has one, or a shipped name; left out, vizdoom-tiny.
        checkpoint: the same by name.
        scenarios: what to play.
        budgets: codes per decision; left out, 1, 2, 4, ... and all.
        episodes: per scenario, budget and agent, at least 2.
        seed: 0 to 999; another seed, other episodes.
        sessions: games that act as one batch, 1 to 1024; above 1, latency is measured afterwards at batch 1.
        output: folder for rollout.json and rollout.md.
        device: where the model runs: cpu, cuda, cuda:1; auto takes a GPU where there is one.
        dtype: float32, bfloat16 or float16.
        backend: auto, or one by name.
    """
    from flexlam_fast.evaluate.load import load_policy
    from flexlam_fast.evaluate.rollout import FILES, check_ladder, check_play, rollout, write_table
    from flexlam_fast.values import check_path, make_folder

    check_play(scenarios, episodes, seed, sessions)
    check_path("output", output)
    policy = load_policy(_one(path, checkpoint), device, dtype, backend)
    check_ladder(policy, budgets)
    make_folder(output, *FILES)
    print(policy.describe(), flush=True)
    table = rollout(policy, scenarios, budgets, episodes=episodes, seed=seed, sessions=sessions)
    print(f"\n{table.text()}\n", flush=True)  # before it is written: a disk may be full by now
    write_table(table, output)
    print("written:", ", ".join(str(output / name) for name in FILES))


def reconstruct(
    path: str = "",
    /,
    *,
    checkpoint: str = "",
    data: Path,
    budgets: tuple[int, ...] | None = None,
    transitions: int = 256,
    seed: int = 0,
    output: Path = Path("out/reconstruct"),
    device: str = "auto",
) -> None:
    """Decode held-out transitions at several budgets and print PSNR and SSIM beside copying o_t.

    Args:
        path: a run, its stage lam or joint, a checkpoint of it, a policy, or a shipped name; left out, vizdoom-tiny.
        checkpoint: the same by name.
        data: packed episodes; their test split is used.
        budgets: codes to decode from; 0 is none at all; left out, 0, 1, 2, 4, ... and all.
        transitions: how many, drawn from the test split.
        seed: of the draw and of the noise.
        output: folder for reconstruct.json, reconstruct.md and strip.png.
        device: where the model runs: cpu, cuda, cuda:1; auto takes a GPU where there is one.
    """
    from flexlam_fast.evaluate.reconstruct import reconstruct as run

    model = _one(path, checkpoint)
    result = run(model, data, budgets=budgets, transitions=transitions, seed=seed, output=output, device=device)
    print(f"\n{result.markdown()}\nwritten: {output}/reconstruct.json, reconstruct.md, strip.png")


def probe(
    path: str = "",
    /,
    *,
    checkpoint: str = "",
    data: Path,
    budgets: tuple[int, ...] | None = None,
    labels: tuple[int, ...] = (1024, 20_000),
    transitions: int = 256,
    seeds: int = 3,
    seed: int = 0,
    output: Path = Path("out/probe"),
    device: str = "auto",
) -> None:
    """Ask what the codes of a latent action model know, and whether it has collapsed, is ignored, or leaks.

    Small networks learn the action from frozen codes, beside the previous action alone and an inverse dynamics model on
    both frames; held-out transitions are decoded from their own codes, from another's, and at cuts between episodes.

    Args:
        path: a run, its stage lam or joint, a checkpoint of it, a policy, or a shipped name; left out, vizdoom-tiny.
        checkpoint: the same by name.
        data: packed episodes, with actions or without; learned from on the train split, judged on the test split.
        budgets: codes to ask; left out, 1, 2, 4, ... and all.
        labels: labelled transitions to learn from, one number or several, each at least 10.
        transitions: how many are decoded, at least 4.
        seeds: draws of labels, at least 2.
        seed: of everything drawn.
        output: folder for probe.json and probe.md.
        device: where the model runs: cpu, cuda, cuda:1; auto takes a GPU where there is one.
    """
    from flexlam_fast.evaluate.probe import FILES
    from flexlam_fast.evaluate.probe import probe as run

    options: dict[str, Any] = {"labels": labels, "transitions": transitions, "seeds": seeds, "seed": seed}
    found = run(_one(path, checkpoint), data, budgets=budgets, output=output, device=device, **options)
    print(f"\n{found.markdown()}\nwritten: {', '.join(str(output / name) for name in FILES)}")


def _one(path: str, checkpoint: str) -> str:
    """What to load, which may be said in two ways."""
    if path and checkpoint and Path(path) != Path(checkpoint):
        raise InputError(f"checkpoint: expected one, got {path!r} and --checkpoint {checkpoint!r}")
    return path or checkpoint or "vizdoom-tiny"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; returns when it went well, and otherwise ends the process with the status that says how.

    2 for a mistake that one sentence explains, 130 for Ctrl-C, 143 for SIGTERM, 141 where the reader of the output is
    gone. SIGTERM ends it after what is open has been closed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        status = _status(given)
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        raise SystemExit(status)


def _status(given: list[str]) -> int:
    """Run a command and return the process's exit status, which is 0 only if all output was written."""
    try:
        check_streams()
        with guarded_output() as output:
            try:
                status = _outcome(given)
                sys.stdout.flush()
            except OSError:
                status = 0
                if output.stdout.error is None and output.stderr.error is None:
                    raise
            lost = output.lost()
        if isinstance(lost, FlexLAMError):
            raise lost
        return status or lost or 0
    except FlexLAMError as error:
        say(f"{PROGRAM}: {error}")
        return error.exit_status


def _outcome(given: list[str]) -> int:
    try:
        _leave_lost_directory()
        _run(given)
    except FlexLAMError as error:
        say(f"{PROGRAM}: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        say(f"\n{PROGRAM}: stopped")
        return 128 + signal.SIGINT
    except SystemExit as stop:  # of the parser of arguments, or of SIGTERM
        if isinstance(stop.code, str):
            say(stop.code)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        say(f"{PROGRAM}: memory: expected enough for this command, got: {' '.join(str(error).split())[:200]}")
        return 2
    return 0


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch says it by a subclass of RuntimeError for a GPU, and by the text of one for the CPU."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _leave_lost_directory() -> None:
    """Go where nothing can be written if the working directory is gone or closed: torch does not even load there."""
    try:
        os.getcwd()
        os.stat(".")
    except OSError:
        with contextlib.suppress(OSError):
            os.chdir("/proc")


def _terminate(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _run(given: list[str]) -> None:
    for word in given:  # the empty path would mean the working directory
        if not word or re.fullmatch(r"--[\w-]+=", word) or "\0" in word:
            raise InputError(f"arguments: expected none that is empty or holds a NUL byte, got {word!r}")
    if not given or given[0] in ("-h", "--help", "help"):
        print(_overview())
    elif given[0] == "--version":
        from flexlam_fast import __version__

        print(f"{PROGRAM} {__version__}")
    elif given[0] in COMMANDS:
        _dispatch(given[0], given[1:])
    else:
        near = difflib.get_close_matches(given[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"command: expected one of {', '.join(COMMANDS)}, got {given[0]!r}{hint}")


def _dispatch(name: str, rest: list[str]) -> None:
    try:
        import tyro
    except ImportError as error:
        raise InputError('tyro: expected it installed, got none; pip install "flexlam_fast[demo]"') from error
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    if command.function:
        tyro.cli(getattr(module, command.function), prog=f"{PROGRAM} {name}", args=rest)
        return
    stages: dict[str, Callable[..., Any]] = {stage: getattr(module, function) for stage, function in TRAIN.items()}
    tyro.extras.subcommand_cli_from_dict(
        stages, prog=f"{PROGRAM} {name}", args=rest, config=(tyro.conf.OmitArgPrefixes,)
    )


def _overview() -> str:
    lines = [f"usage: {PROGRAM} COMMAND [options]     ({PROGRAM} COMMAND --help lists them)", ""]
    lines += [f"  {name:<12} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "  --version    print the version"])


def _told(store: Any) -> None:
    """Say what a finished data set holds."""
    from flexlam_fast.data.names import shown

    counts = [f"{len(store.transitions(split))} {split} transitions" for split in ("train", "test")]
    print(f"{shown(store.path)}: {len(store.episodes)} episodes, {', '.join(counts)}, tasks {', '.join(store.tasks)}")
