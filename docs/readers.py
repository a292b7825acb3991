"""Which packages of src read a key of the config: column "read by" of docs/config.md, from the syntax trees alone.

An attribute counts where the type of what stands before it is known: parameters, fields, results and `self` by their
annotations, other names by what they are given. `options = run.task` and `options.steps` is a reader of task.steps.
A protocol such as `src.run.Validates` stands for every class that has all of its members.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

HOME = Path(__file__).parents[1]
Types = frozenset[str]  # names of classes; of one name there is one class, or they have the same members
NONE: Types = frozenset()
BINDING = ast.AnnAssign | ast.Call | ast.Assign | ast.NamedExpr | ast.For | ast.comprehension


def read_by(owner: str, field: str) -> list[str]:
    """Packages with a module that reads this field of the class `src.<module>.<Class>`, sorted; empty where none is
    found: names that are put together at run time are not.
    """
    cls = "Run" if owner.endswith(".Top") else owner.rpartition(".")[2]  # whose fields are the keys beside the groups
    code = Code.of_src()
    related = {cls, *code.above(cls), *(each for each in code.members if cls in code.above(each))}
    related |= {each for each in code.protocols if code.satisfies(cls, each) and field not in code.methods[each]}
    return sorted({package for each in related for package in code.reads.get((each, field), ())})


def named(annotation: ast.expr | None) -> Types:
    """Every name in an annotation, also in one that is a string."""
    if annotation is None:
        return NONE
    found: set[str] = set()
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isprintable():
            try:
                found |= named(ast.parse(node.value, mode="eval").body)
            except SyntaxError:
                continue  # of a Literal: a word, and no name of a class
    return frozenset(found)


class Code:
    """What classes of src have, and which package reads what of them."""

    def __init__(self, modules: Mapping[str, ast.Module]) -> None:
        self.bases: dict[str, set[str]] = defaultdict(set)
        self.members: dict[str, dict[str, Types]] = defaultdict(dict)
        self.methods: dict[str, set[str]] = defaultdict(set)  # of members, those that are no properties
        self.results: dict[str, Types] = defaultdict(frozenset)
        self.reads: dict[tuple[str, str], set[str]] = defaultdict(set)
        for tree in modules.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self._learn(node)
                elif isinstance(node, ast.FunctionDef):
                    self.results[node.name] |= named(node.returns)
        self.protocols = {name for name, bases in self.bases.items() if "Protocol" in bases}
        for package, tree in modules.items():
            Reader(self, package.partition(":")[0]).visit(tree)

    @classmethod
    @cache
    def of_src(cls) -> "Code":
        files = sorted((HOME / "src").rglob("*.py"))
        packages = [".".join(file.parent.relative_to(HOME).parts) for file in files]
        named_files = [f"{package}:{file.stem}" for package, file in zip(packages, files, strict=True)]
        texts = [file.read_text(encoding="utf-8") for file in files]
        return cls(dict(zip(named_files, map(ast.parse, texts), strict=True)))

    def _learn(self, node: ast.ClassDef) -> None:
        members = self.members[node.name]
        self.bases[node.name].update(*map(named, node.bases))
        for each in node.body:
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                members[each.target.id] = named(each.annotation)
            elif isinstance(each, ast.FunctionDef):
                if not each.decorator_list:
                    self.methods[node.name].add(each.name)
                result = named(each.returns)
                members[each.name] = frozenset({node.name}) if "Self" in result else result
                given = {one.arg: named(one.annotation) for one in (*each.args.args, *each.args.kwonlyargs)}
                for target, value in assignments([*ast.walk(each)] if each.name == "__init__" else ()):
                    if isinstance(target, ast.Attribute) and isinstance(value, ast.Name) and value.id in given:
                        members[target.attr] = given[value.id]  # self._options = options

    @cache  # noqa: B019 - one lives as long as the process
    def above(self, name: str) -> Types:
        """Classes that this one inherits from, at any distance."""
        direct = frozenset(self.bases.get(name, ()))
        return direct.union(*(self.above(each) for each in direct if each != name))

    def satisfies(self, name: str, protocol: str) -> bool:
        """Whether a class has every member of a protocol."""
        return self.members[protocol].keys() <= {
            member for each in (name, *self.above(name)) if each in self.members for member in self.members[each]
        }

    def member(self, owners: Types, name: str) -> Types:
        lines = ({owner, *self.above(owner)} for owner in owners)
        return NONE.union(
            *(self.members[each].get(name, NONE) for line in lines for each in line & self.members.keys())
        )


def assignments(nodes: Iterable[ast.AST]) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Targets with their values, those of `a, b = c, d` one by one; loops give each of what they go through."""
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pair = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                if pair and len(target.elts) == len(node.value.elts):  # type: ignore[attr-defined]
                    yield from zip(target.elts, node.value.elts, strict=True)  # type: ignore[attr-defined]
                else:
                    yield target, node.value
        elif isinstance(node, ast.NamedExpr):
            yield node.target, node.value
        elif isinstance(node, ast.For | ast.comprehension):
            yield node.target, node.iter


class Reader(ast.NodeVisitor):
    """Adds the attributes that one module reads to `Code.reads`."""

    def __init__(self, code: Code, package: str) -> None:
        self._code, self._package = code, package
        self._names: list[dict[str, Types]] = [{}]
        self._class: str | None = None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._class = self._class, node.name
        self.generic_visit(node)
        self._class = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        names = {each.arg: named(each.annotation) for each in arguments}
        if self._class is not None and arguments and arguments[0].arg == "self":
            names["self"] = frozenset({self._class})
        self._names.append(names)
        below = [each for each in ast.walk(node) if isinstance(each, BINDING)]
        for each in below:
            if isinstance(each, ast.AnnAssign):
                self._bind(each.target, named(each.annotation))
            elif isinstance(each, ast.Call) and getattr(each.func, "id", "") == "isinstance":
                self._bind(each.args[0], named(each.args[1]))
        for target, value in [*assignments(below)] * 2:  # the order of the walk is not that of the lines
            self._bind(target, self._type(value))
        self.generic_visit(node)
        self._names.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._read(node.value, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(func=ast.Name("getattr"), args=[owner, ast.Constant(str() as name), *_]):
                self._read(owner, name)
        self.generic_visit(node)

    def _read(self, owner: ast.expr, name: str) -> None:
        for each in self._type(owner):
            self._code.reads[each, name].add(self._package)

    def _bind(self, target: ast.expr, types: Types) -> None:
        if isinstance(target, ast.Name):
            self._names[-1][target.id] = self._names[-1].get(target.id, NONE) | types
        elif isinstance(target, ast.Tuple):
            for each in target.elts:
                self._bind(each, types)

    def _type(self, node: ast.expr) -> Types:
        match node:
            case ast.Name(id=name):
                return next((names[name] for names in reversed(self._names) if name in names), NONE)
            case ast.Attribute(value=owner, attr=name):
                return self._code.member(self._type(owner), name)
            case ast.Call(func=ast.Name(id="replace"), args=[owner, *_]):
                return self._type(owner)
            case ast.Call(func=ast.Name(id=name)):
                return frozenset({name}) if name in self._code.members else self._code.results.get(name, NONE)
            case ast.Call(func=ast.Attribute(value=owner, attr="model_copy")) | ast.Subscript(value=owner):
                return self._type(owner)
            case ast.Call(func=ast.Attribute(value=owner, attr=name)):
                return self._code.member(self._type(owner), name)
            case ast.IfExp(body=one, orelse=other):
                return self._type(one) | self._type(other)
            case ast.BoolOp(values=many) | ast.Tuple(elts=many) | ast.List(elts=many):
                return NONE.union(*map(self._type, many))
        return NONE
