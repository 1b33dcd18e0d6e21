"""Options: parsers whose errors are one line that names the key, the value and the remedy."""

import inspect
import re
import sys
from argparse import ArgumentError
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import docstring_parser
import yaml
from jsonargparse import ArgumentParser
from jsonargparse._link_arguments import ActionLink

from ddpm_lightning.errors import InputError
from ddpm_lightning.randomness import NUM_SEEDS

Name = TypeVar("Name", bound=str)

# What jsonargparse says, with line breaks made spaces, and how it reads better. In this order.
_READABLE = [
    (r"^unrecognized arguments: (--[^\s=]+).*", r"no option \1"),
    (r"^unrecognized arguments: (\S+).*", r"no place for \1; options begin with --"),
    (r"(?:Subcommand|Group) '[^']*' does not accept option '([^']*)'", r"no option \1"),
    (r"Option '([^']*)' is not accepted.*", r"no option \1"),
    (r'Linked "([^"]*)" must be given via "([^"]*)"\.?', r"\1: give \2, which sets it"),
    (r'^Parser key "config": ', "--config: "),
    (r'Parser key "([^"]*)"( element \d+)?:', r"\1\2:"),
    (r"- Expected a path but \S+ either not accessible or invalid - ", ""),
    (r"Problem with given class_path '([^']*)':", r"\1:"),
    (r"Type typing\.Callable.* expects a function or a callable class: ", ""),
    (r"Import path (\S+) does not correspond to a subclass of", r"\1 is no"),
    (r"Expected a dot import path string: (.*)", r"no class \1; give package.module.Class"),
    (r"Problems parsing config: ", "not YAML: "),
    (r' in "<unicode string>", (line \d+), column \d+', r" (\1)"),
    (r"Unexpected config:.*", "holds no options; a line reads KEY: VALUE"),
    (r"(?:typing\.)?Literal\[([^]]*)\]", r"one of \1"),
    (r"<(?:class|enum) '(?:[\w.]+\.)?(\w+)'>", r"\1"),
    (r"\.? Got value: Namespace\(.*", ""),
    (r"Expected an? (.*?)\. Got value:", r"expected \1, got"),
]


# Of a file of options: ten times what any has.
_MAX_DEPTH = 50
_MAX_NODES = 10_000
_NESTED = "not options: nested too deeply, or by *names to too many values"


class LineErrors(ArgumentParser):
    """A parser whose errors are one line that names the key and the nearest right one."""

    _config: str | None = None

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a --config file, whose name goes into the errors."""
        self._config = str(path)
        try:
            return super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"not a text file ({error.reason})")
        finally:
            self._config = None

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parse what a --config file holds, if it is what a file of options may be."""
        try:
            nodes = _check_yaml(content)
            for action in self._actions:
                if isinstance(action, ActionLink) and action.target[0] in nodes:
                    # on a command line it is refused; in a file it would be ignored
                    key, source = action.target[0], action.source[0][0]
                    self.error(f'Linked "{key}" must be given via "{source}"')
            for section in self.groups or ():
                if section in nodes and not isinstance(nodes[section], yaml.MappingNode):
                    self.error(f"{section}: holds no options; leave it out")
            return super().parse_string(content, *args, **kwargs)
        except ValueError as error:  # numbers of more digits than Python reads
            self.error(str(error))

    def validate(self, namespace: Any, skip_unset: bool = True, **kwargs: Any) -> None:
        """Check the values' types, of null too, which would else pass for any type."""
        super().validate(namespace, skip_unset, **kwargs)  # what is missing is told as that
        given = namespace.clone()
        for action in self._actions:
            # of several words, not given: it would look for each of them
            if action.nargs and given.get(action.dest, ()) is None:
                del given[action.dest]
        super().validate(given, skip_unset=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        text = _readable(" ".join(str(ex or message).split()))
        text += _suggest(text, _option_names(self))
        if not self.exit_on_error:  # the parser of a class's arguments: its caller says where
            raise ArgumentError(None, text) from ex
        place = f"{self._config}: " if self._config else ""
        sys.stderr.write(f"error: {place}{text}\n")
        sys.exit(2)


def _check_yaml(text: str) -> dict[str, yaml.Node]:
    """Refuse what YAML allows but no file of options means.

    Returns:
        The values of all levels by their keys, joined by dots.

    Raises:
        ValueError: It holds a key twice, of which the first would be lost; or it is nested without
            end, or so deeply or often that reading it would not end.
    """
    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        if "nesting depth" in str(error):  # PyYAML from 6.0.4 on has a limit of its own
            raise ValueError(_NESTED) from error
        return {}  # the parser says it
    found: dict[str, yaml.Node] = {}
    nodes = deque([(root, "", 0)])
    num_nodes = 0
    while nodes:
        node, prefix, depth = nodes.pop()
        num_nodes += 1
        if depth > _MAX_DEPTH or num_nodes > _MAX_NODES:  # *names lead to the same node again
            raise ValueError(_NESTED)
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:  # no path or name has one
            raise ValueError(f"{prefix.removesuffix('.')}: holds a character of code 0")
        if isinstance(node, yaml.SequenceNode):
            nodes += [(item, f"{prefix}[].", depth + 1) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines:
                    place = f"lines {lines[name]} and {line}"
                    raise ValueError(f"{prefix}{name} is given twice ({place}); keep one of them")
                lines[name] = line
                found[prefix + name] = value
                nodes.append((value, f"{prefix}{name}.", depth + 1))
    return found


def _readable(text: str) -> str:
    """Shorten an error of jsonargparse to the key, what it takes and what it got."""
    text = re.sub(
        r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - (.*) "
        r"Given value type: .*? Given value: (.*)",
        lambda match: _either(match[1].split(" - "), match[2]),
        text,
    )
    for pattern, replacement in _READABLE:
        text = re.sub(pattern, replacement, text)
    return text


def _either(errors: list[str], value: str) -> str:
    """Say what a value that may have several types should have been."""
    types = [
        re.sub(r"^dot import path.*", "package.module.Class", error.removeprefix("Expected a "))
        for error in errors
        if error.startswith("Expected a ") and "NoneType" not in error
    ]
    # Where a class was named, what is wrong with it says more than the other types.
    told = next((error for error in errors if error.startswith("Problem with given class")), None)
    return told or f"Expected a {' or '.join(types)}. Got value: {value}"


def _suggest(text: str, names: list[str]) -> str:
    """Give the nearest of the names to an unknown option, as a clause; "" for none."""
    match = re.fullmatch(r"no option (--)?(\S+)", text)
    # what only the command line has is not in a file, though its name is right
    near = get_close_matches(match[2], set(names) - {match[2]}, n=1) if match else []
    return f"; did you mean {match[1] or ''}{near[0]}?" if match and near else ""


def parse_options(
    command: Callable[..., object],
    name: str,
    usage: str = "CHECKPOINT [options]",
    words: Mapping[str, int | str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Read sys.argv by a command's signature and docstring, which thus are its --help.

    Args:
        command: The command.
        name: What it is called.
        usage: What follows its name.
        words: The arguments that take several words, and how many, as argparse counts them (2, +,
            *); those without a default stand without an option's name.
    """
    docstring = docstring_parser.parse_from_object(command)
    parser = LineErrors(
        prog=f"python -m ddpm_lightning {name}",
        usage=f"%(prog)s {usage}",
        description=docstring.description,
        allow_abbrev=False,
    )
    parameters = inspect.signature(command).parameters
    helps = {item.arg_name: item.description for item in docstring.params}
    for key, num_words in words.items():
        prefix = "" if parameters[key].default is inspect.Parameter.empty else "--"
        parser.add_argument(f"{prefix}{key}", nargs=num_words, type=str, help=helps[key])
    parser.add_function_arguments(command, as_group=False, as_positional=True, skip=set(words))
    arguments = sys.argv[2:]
    for index, argument in enumerate(arguments):
        named = argument.startswith("--")  # a file or folder may be called gif
        default = parser.get_defaults().get(argument.removeprefix("--")) if named else None
        bare = arguments[index + 1 : index + 2] not in (["true"], ["false"])
        if isinstance(default, bool) and bare:  # --gif means --gif true
            arguments[index] = f"{argument}=true"
    return dict(parser.parse_args(arguments).as_dict())


def split_names(option: str, text: str, known: Iterable[Name]) -> list[Name]:
    """Read names divided by commas.

    Raises:
        InputError: There is none, one twice, or one that is not known.
    """
    names: dict[str, Name] = {str(name): name for name in known}
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in names:
            near = get_close_matches(word, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{option} {text}: {word!r} is none of {', '.join(names)}{hint}")
    if len(set(words)) < len(words):
        raise InputError(f"{option} {text}: names one of them twice")
    return [names[word] for word in words]


def split_numbers(option: str, text: str, least: int = 1) -> list[int]:
    """Read whole numbers from `least` on, divided by commas.

    Raises:
        InputError: There is none, one twice, or something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise InputError(f"{option} {text}: say something like 50 or 20,50,100")
    if len({int(word) for word in words}) < len(words):
        raise InputError(f"{option} {text}: names a number twice")
    return [int(word) for word in words]


def parse_ranges(option: str, text: str, example: str) -> list[int]:
    """Read whole numbers and ranges of them, divided by commas, below the number of seeds.

    Raises:
        InputError: One is something else, or a range does not rise.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"{option} {text}: say something like {example}")
        start, stop = int(first), int(last or first) + 1
        if not start < stop <= NUM_SEEDS:
            raise InputError(f"{option} {text}: ranges rise, within 0-{NUM_SEEDS - 1}")
        numbers += range(start, stop)
    return numbers


def _option_names(parser: Any) -> list[str]:
    """Give the names of a parser's options, and of its commands'."""
    names = []
    for action in parser._actions:
        names += [option.removeprefix("--") for option in action.option_strings]
        if isinstance(action.choices, dict):
            names += [
                name for command in action.choices.values() for name in _option_names(command)
            ]
    return names
