"""Docstrings in the way of transformers, [`Name`], as links of mkdocstrings."""

import re

import griffe


class Links(griffe.Extension):
    """[`Name`] and [`Name`](package.Name) become [`Name`][package.Name], public names only."""

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        """Write the links of a whole package anew."""
        self._public = {str(name).strip("'\"") for name in pkg.exports or ()}
        self._visit(pkg)

    def _visit(self, parent) -> None:
        for member in parent.members.values():
            if member.is_alias:
                continue
            if member.docstring:
                member.docstring.value = re.sub(
                    rf"\[(`(\w+)`)\](?:\({parent.package.name}\.\w+\))?",
                    lambda link: self._link(parent.package.name, link[1], link[2]),
                    member.docstring.value,
                )
            if member.is_class or member.is_module:
                self._visit(member)

    def _link(self, package: str, text: str, name: str) -> str:
        return f"[{text}][{package}.{name}]" if name in self._public else text
