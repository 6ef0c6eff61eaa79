"""The command line of an experiment: `cli(main, Settings, PRESETS)`.

`--preset NAME` or `--settings FILE` chooses the starting values, `--distributed` joins several processes,
`--deterministic` asks a GPU for the same bits in every run, and every other flag, generated from the fields of the
settings dataclass, changes one value. An error the user can fix prints one line on stderr, plus the command that helps
if there is one, and exits with status 2.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import re
import shlex
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

from jaxgpt.config import Range
from jaxgpt.errors import UserError, needs_extra
from jaxgpt.files import read_json, suggest_name
from jaxgpt.runs.endings import (
    Stopped,
    go_on_without_output,
    plain_endings,
    raise_at_ctrl_c,
    take_hangup_as_sigterm,
)
from jaxgpt.runs.peers import join_processes
from jaxgpt.runs.process import prepare_process, print_device, request_determinism
from jaxgpt.runs.settings import flatten_json, settings_from_json, settings_to_json

with needs_extra("train"):
    import tyro
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

__all__ = ["cli", "parse", "settings_from_json", "settings_to_json"]

PROCESS_FLAGS = ("--distributed", "--deterministic")  # they set up the process and aren't settings of a run
Settings = TypeVar("Settings")
Result = TypeVar("Result")


def cli(
    main: Callable[[Settings], Result],
    settings_type: type[Settings],
    presets: Mapping[str, Settings],
    argv: Sequence[str] | None = None,
    announce: Callable[[], None] = print_device,
) -> Result:
    """Read the settings from the command line, set the process up, print the device (`announce`), and return
    `main(settings)`.

    See `plain_endings` for how the process ends otherwise. A program with a run folder continues when its output can't
    be written."""
    with plain_endings(functools.partial(_suggested_command, main), whole_process=argv is None) as ending:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _stop_on_sigterm)
            take_hangup_as_sigterm()
        description = _description(main, settings_type)
        words = sys.argv[1:] if argv is None else argv
        settings = parse(settings_type, presets, words, description, _program(main))
        if hasattr(settings, "run"):
            go_on_without_output()
        prepare_process()
        if "--deterministic" in words:
            request_determinism()
        processes = _option(words, "--distributed")
        if processes is not None:
            ending.siblings = join_processes(processes)
        announce()
        raise_at_ctrl_c()
        return main(settings)


def _suggested_command(main: Callable[..., Any], error: UserError) -> str:
    """The command of the experiment that the error names, if it is beside the running one or in the folder above."""
    running = getattr(sys.modules.get(main.__module__), "__file__", None)
    if not error.experiment or running is None:
        return ""
    name, *flags = error.experiment
    for folder in Path(running).resolve().parents[:2]:
        file = folder / f"{name}.py"
        if file.exists():
            local = file.is_relative_to(Path.cwd())
            where = ["-m", ".".join(_short(file).with_suffix("").parts)] if local else [str(file)]
            return f"\n  try: {shlex.join([str(_short(Path(sys.executable))), *where, *flags])}"
    return ""


def _short(path: Path) -> Path:
    """Relative to the working directory, if inside it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _stop_on_sigterm(number: int, frame: Any) -> NoReturn:
    raise Stopped("SIGTERM received", 75)


def parse(
    settings_type: type[Settings],
    presets: Mapping[str, Settings],
    argv: Sequence[str],
    description: str = "",
    program: str | None = None,
) -> Settings:
    """Parse `argv` into settings. `--help` prints and exits; wrong options raise UserError (a value that does not parse
    is reported by tyro, which exits with 2). `program`: its name in the usage line."""
    if get_type_hints(settings_type).get("model") is Path:  # both flags name the model to start from
        argv = [re.sub(r"^--model\.pretrained(?==|$)", "--model", word) for word in argv]
    start = _starting_values(settings_type, presets, argv)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            command, unknown = tyro.cli(
                _command_type(settings_type, presets, start),
                prog=program,
                args=list(argv),
                description="\n\n".join(filter(None, [description, _presets_text(settings_type, presets)])),
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
                registry=_registry_with_ranges(),
            )
    except SystemExit as stop:
        refusal = _user_error(stop)
        if refusal is not None:
            raise refusal from None
        sys.stderr.write(complaint.getvalue())
        raise
    if unknown:
        raise UserError(_unknown_message(unknown, ["--preset", "--settings", *PROCESS_FLAGS, *_flags(settings_type)]))
    return command.values


def _registry_with_ranges() -> ConstructorRegistry:
    """tyro's own rules, but --help shows a field's `Range` beside its default."""
    registry = ConstructorRegistry()
    inside: list[StructTypeInfo] = []

    @registry.struct_rule
    def rule(kind: StructTypeInfo) -> StructConstructorSpec | None:
        if inside:  # called by the line below: leave it to the next rule, which is tyro's
            return None
        inside.append(kind)
        try:
            found = ConstructorRegistry.get_struct_spec(kind)
        finally:
            inside.pop()
        if not isinstance(found, StructConstructorSpec):
            return None
        return dataclasses.replace(found, fields=tuple(map(_show_range, found.fields)))

    return registry


def _show_range(field: StructFieldSpec) -> StructFieldSpec:
    ranges = [str(mark) for mark in getattr(field.type, "__metadata__", ()) if isinstance(mark, Range)]
    if not ranges:
        return field
    hint = tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {default}; {', '.join(ranges)})")
    shown: Any = Annotated[field.type, hint]
    return dataclasses.replace(field, type=shown)


def _user_error(stop: BaseException) -> UserError | None:
    """The UserError from the settings' own __post_init__ that made tyro stop, if there was one, with the path to those
    settings before its message."""
    place = ""
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, UserError):
        place, cause = getattr(cause, "arg", place), cause.__context__
    if cause is None:
        return None
    inside = str(place).removeprefix("values").removeprefix(".")
    return UserError(f"{inside}.{cause}") if inside else cause


def _starting_values(settings_type: type[Settings], presets: Mapping[str, Settings], argv: Sequence[str]) -> Settings:
    """The instance named by --preset or --settings, otherwise the dataclass's own defaults."""
    preset, file = _option(argv, "--preset"), _option(argv, "--settings")
    if preset is not None and file is not None:
        raise UserError("--preset and --settings both choose the starting values; give one of them")
    if preset is not None:
        if preset not in presets:
            names = ", ".join(presets) or "none exist"
            raise UserError(f"unknown preset {preset!r} (presets: {names}){suggest_name(preset, presets)}")
        return presets[preset]
    if file is not None:
        return _read_settings(settings_type, Path(file))
    return settings_type()


def _option(argv: Sequence[str], flag: str) -> str | None:
    """The value of `--flag VALUE` or `--flag=VALUE`; the last one counts."""
    value = None
    for i, word in enumerate(argv):
        if word == flag:
            if i + 1 == len(argv) or argv[i + 1].startswith("--"):
                raise UserError(f"{flag} needs a value")
            value = argv[i + 1]
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


def _read_settings(settings_type: type[Settings], file: Path) -> Settings:
    """Settings from a run's settings.json (or its folder), or from a file that holds nothing but settings."""
    path = file / "settings.json" if file.is_dir() else file
    data = read_json(path)
    if isinstance(data, dict) and {"stage", "settings"} <= data.keys():
        data = data["settings"]
    for name in ("fresh", "force"):
        if isinstance(data, dict) and data.get(name):
            raise UserError(
                f"{path}: {name} is {data[name]}, but a settings file may not set it; remove it and pass --{name}"
            )
    return settings_from_json(settings_type, data, where=str(path))


def _command_type(settings_type: type[Settings], presets: Mapping[str, Settings], start: Settings) -> Any:
    """A dataclass of --preset, --settings, PROCESS_FLAGS and the settings, whose defaults are `start`."""
    preset = tyro.conf.arg(
        metavar="{" + ",".join(presets) + "}", help="Named settings to start from.", help_behavior_hint=""
    )
    file = tyro.conf.arg(
        metavar="FILE", help="A run's settings.json to start from, to repeat that run.", help_behavior_hint=""
    )
    processes = tyro.conf.arg(
        metavar="auto|HOST:PORT,COUNT,INDEX",
        help="Join several processes: auto asks the cluster; or give process 0's address, their number, and the index "
        "of this one.",
        help_behavior_hint="",
    )
    same_bits = tyro.conf.arg(
        help="The same bits in every run on the same kind of GPU, slower (docs/runs.md); changes nothing elsewhere."
    )
    fields: list[Any] = [
        ("settings", Annotated[str, file], ""),
        ("distributed", Annotated[str, processes], ""),
        ("deterministic", tyro.conf.FlagCreatePairsOff[Annotated[bool, same_bits]], False),
        ("values", Annotated[settings_type, tyro.conf.arg(name="")], dataclasses.field(default_factory=lambda: start)),
    ]
    if presets:
        fields.insert(0, ("preset", Annotated[str, preset], ""))
    return dataclasses.make_dataclass("Command", fields, frozen=True)


def _program(main: Callable[..., Any]) -> str | None:
    """How the experiment is started, "python -m experiments.ppo"; None for a script."""
    spec = getattr(sys.modules.get(main.__module__), "__spec__", None)
    return f"python -m {spec.name}" if spec else None


def _description(main: Callable[..., Any], settings_type: type) -> str:
    """The docstrings of the experiment's module and its settings, which give the command and what to expect."""
    module = sys.modules.get(main.__module__)
    docs = [inspect.getdoc(module) if module else None]
    if not (settings_type.__doc__ or "").startswith(f"{settings_type.__name__}("):  # a dataclass's automatic docstring
        docs.append(inspect.getdoc(settings_type))
    return "\n\n".join(doc for doc in docs if doc)


def _presets_text(settings_type: type, presets: Mapping[str, Any]) -> str:
    """One paragraph per preset: the flags that differ from the defaults."""
    default = flatten_json(settings_to_json(settings_type()))
    lines = []
    for name, settings in presets.items():
        changed = [
            (key, value) for key, value in flatten_json(settings_to_json(settings)).items() if value != default.get(key)
        ]
        words = " ".join(f"--{key.replace('_', '-')} {_flag_value(value)}" for key, value in changed)
        lines += textwrap.wrap(
            f"  {name:<10} {words or 'the defaults'}", width=96, subsequent_indent=" " * 13, break_on_hyphens=False
        )
    return "\n".join(["presets", *lines]) if presets else ""


def _flag_value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flags(settings_type: Any, prefix: str = "") -> list[str]:
    """Every flag of the settings as --help spells it, nested ones dotted."""
    flags = []
    for name, kind in get_type_hints(settings_type).items():
        if name not in {field.name for field in dataclasses.fields(settings_type)}:
            continue
        dotted = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            flags += _flags(kind, f"{dotted}.")
        else:
            flags.append(f"--{dotted}")
            if kind is bool:
                head, _, last = dotted.rpartition(".")
                flags.append(f"--{head}.no-{last}" if head else f"--no-{last}")
    return flags


def _unknown_message(unknown: Sequence[str], flags: Sequence[str]) -> str:
    for word in unknown:
        if word.startswith("-"):
            flag = word.split("=")[0].replace("_", "-")
            by_last_part = {f"--{known.removeprefix('--').rpartition('.')[2]}": known for known in flags}
            nested = f"; did you mean {by_last_part[flag]}?" if flag in by_last_part else ""
            hint = nested or suggest_name(flag, flags) or "; --help lists the options"
            return f"unknown option {word.split('=')[0]}{hint}"
    return f"unexpected argument {unknown[0]!r}; options start with --, and --help lists them"
