"""`python launch.py --help [word ...]`: how to begin; a group, an option or a key. Without Hydra and without torch."""

from collections.abc import Sequence

from src.config import synonyms
from src.config.groups import EXPERIMENT, GROUPS, RECIPE, options
from src.config.presets import defaults
from src.config.reference.keys import WIDTH, Key, keys, kinds, top_keys
from src.config.reference.options import ABOUT_GROUPS, listed
from src.config.wording import nearest
from src.errors import ConfigError
from src.storage.streams import broken

FLAGS = ("--help", "-h")
BEGIN = """\
python launch.py [-m] [group=option ...] [group.key=value ...]

  python launch.py                                  trains a small model here, now
  python launch.py experiment=own_text data.files=my/
                                                    trains on your own text
  python launch.py model=llama3_8b parallel=tp2_fsdp4 dry_run=true
                                                    says what would happen; starts nothing
  python launch.py -m optim.lr=2e-4,4e-4            a sweep: a run for each value
  python launch.py folder=runs/<name>-<hash>        goes on with a run, as it was

The same command again goes on where the run stands; Ctrl-C saves first.

Groups (group=option), with the option of a command that names none:"""
MORE = """\
More:
  --help model                options and keys of a group
  --help model=llama3_8b      keys of an option, with its values
  --help task.seq_len         one key: meaning, range, default
  --cfg job                   the whole config of a command, with who decided each value
  python -m src.runs          list, watch and compare runs; python -m src.sweeps: sweeps
  docs/config.md              every key"""


def help_of(argv: Sequence[str], width: int = WIDTH) -> str:
    """The answer to a command line with --help, in lines of `width` columns. ConfigError for a word that names no
    group, option or key.
    """
    words = [each for each in argv if each not in FLAGS and not each.startswith("-")]
    said = "\n\n".join(_of(word) for word in words) if words else _short()
    return "\n".join(broken(line, width) for line in said.split("\n"))


def wants_help(argv: Sequence[str]) -> bool:
    return any(each in FLAGS for each in argv)


def _short() -> str:
    rows = [(name, ABOUT_GROUPS[name], defaults().get(name, "")) for name in GROUPS]
    lines = [f"  {name:15}  {chosen if chosen != 'None' else '':12}  {about}" for name, about, chosen in rows]
    return "\n".join([BEGIN, *lines, "", MORE])


def _of(word: str) -> str:
    word = word.lstrip("+")
    name, equals, option = word.partition("=")
    if name in ABOUT_GROUPS:
        if equals and option:
            if option not in options(name):
                raise ConfigError(f"{word}: no such option; there are:\n" + "\n".join(listed(name)))
            return "\n".join([*listed(name, [option]), "", *_lines(keys(name, option))]).rstrip()
        return _group(name)
    found = _named(name)
    if not found:
        known = sorted({each.name for each in _every()} | {*GROUPS})
        meant = synonyms.ours(name) or nearest(name, [*known, *(each.rpartition(".")[2] for each in known)])
        raise ConfigError(f"{name}: no such group or key; " + (f"did you mean {meant}?" if meant else "see --help"))
    return "\n\n".join(_key(each) for each in found)


def _group(group: str) -> str:
    chosen = defaults().get(group, "")
    lines = [f"{group}: {ABOUT_GROUPS[group]}", "", f"{group}=", *listed(group)]
    if group in (RECIPE, EXPERIMENT):
        return "\n".join([*lines, "", f"what one sets: conf/{group}/<option>.yaml"])
    for target, names in kinds(group).items():
        default = ", the default" if names[0] == chosen else ""
        lines += ["", f"keys of {group}={names[0]}{default} ({target.rpartition('.')[2]}):"]
        lines += _lines(keys(group, names[0]))
    return "\n".join(lines)


def _lines(found: Sequence[Key]) -> list[str]:
    return [line for each in found for line in each.lines()]


def _key(key: Key) -> str:
    group = key.name.partition(".")[0]
    lines = key.lines()
    if group in ABOUT_GROUPS:
        others = {
            option: each.default
            for option in options(group)
            for each in _keys_of(group, option)
            if each.name == key.name
        }
        different = {option: value for option, value in others.items() if value != key.default}
        shown = [f"{value or 'null'} ({option})" for option, value in list(different.items())[:8]]
        lines += [f"    elsewhere: {', '.join(shown)}"] if shown else []
    return "\n".join([*lines, f"    read by {key.owner}"])


def _keys_of(group: str, option: str) -> tuple[Key, ...]:
    return keys(group, option) if group not in (RECIPE, EXPERIMENT) else ()


def _every() -> list[Key]:
    """Each key of each class once, as the plainest option of the class has it."""
    groups = [group for group in GROUPS if group not in (RECIPE, EXPERIMENT)]
    options_of = [(group, names[0]) for group in groups for names in kinds(group).values()]
    return [*top_keys(), *(key for group, option in options_of for key in keys(group, option))]


def _named(name: str) -> list[Key]:
    """The one of a dotted name, as the default option's class has it, or else those with this last part."""
    every = _every()
    exact = [each for each in every if each.name == name]
    return exact[:1] or list({each.name: each for each in reversed(every) if each.name.endswith(f".{name}")}.values())
