"""Functions as commands: jsonargparse reads their signatures, docstrings say what each argument is."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, getdoc, signature
from pathlib import Path
from typing import get_args, get_origin

from jsonargparse import ArgumentParser

Command = Callable[..., Sequence[str | Path] | str | None]


def run(program: str, commands: Command | Mapping[str, Command], arguments: Sequence[str] | None = None) -> None:
    """Run a function, or that of several whose name comes first, and print what it returns; errors are one line."""
    if callable(commands):
        parser = _parser_of(commands, program)
        command, values = commands, parser.parse_args(arguments)
    else:
        parser = ArgumentParser(prog=program, description="COMMAND --help has the options of each.")
        choices = parser.add_subcommands(dest="command")
        for name, each in commands.items():
            choices.add_subcommand(name, _parser_of(each), help=getdoc(each).splitlines()[0])
        chosen = parser.parse_args(arguments)
        command, values = commands[chosen.command], chosen[chosen.command]
    try:
        printed = command(**values.as_dict())
    except (OSError, ValueError) as error:
        parser.exit(2, f"{program}: {error}\n")
    for line in [printed] if isinstance(printed, str) else printed or ():
        sys.stdout.write(f"{line}\n")


def _parser_of(command: Command, program: str | None = None) -> ArgumentParser:
    """Make a parser of a function's arguments: lists are several words, ``--data a b``, and switches need none."""
    told = dict(re.findall(r"^    (\w+): (.*?)(?=^ {,4}\S|\Z)", getdoc(command), re.MULTILINE | re.DOTALL))
    parser, by_hand = ArgumentParser(prog=program, description=getdoc(command).splitlines()[0]), set()
    for name, parameter in signature(command).parameters.items():
        option, about = f"--{name.replace('_', '-')}", " ".join(told[name].split())
        hints = parameter.annotation, *get_args(parameter.annotation)  # a list may be one of several
        lists = [hint for hint in hints if get_origin(hint) is Sequence]
        if parameter.annotation is bool:
            parser.add_argument(option, action="store_true", help=about)
        elif lists:
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            names, given = (name, {}) if default in (Parameter.empty, []) else (option, {"default": default})
            count = "*" if default == [] else "+"
            parser.add_argument(names, nargs=count, type=get_args(lists[0])[0], help=about, **given)
        else:
            continue
        by_hand.add(name)
    parser.add_function_arguments(command, as_group=False, as_positional=True, skip=by_hand)
    return parser
