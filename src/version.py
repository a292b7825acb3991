"""The version of this project, the one place that code reads it from; pyproject.toml and CHANGELOG.md say the same."""

VERSION = "0.2.0"
