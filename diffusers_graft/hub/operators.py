"""An operator as a repository of the Hub: one file of source, its description with a conformance report, and a card.

The source runs only where the caller trusts it and names the commit, and then only as the text that was described.
"""

from __future__ import annotations

import logging
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .. import operators
from ..cards.card import CARD, citation, template
from ..cards.hub_metadata import check_license
from ..cards.user_edits import add_note
from ..core.storage import read_json, write_json, write_text
from ..errors import FileError, MissingDependencyError
from ..operators import Operator, OperatorConfig
from ..operators.conformance.suite import Report, check_operator
from ..operators.registry import note_repository, register
from ..serialization.describe import versions
from ..serialization.download import local_folder
from ..serialization.remote_code.operator_source import (
    describe_code,
    file_of,
    hash_of,
    is_pinned,
    missing_permission,
    run_operator,
    source_text,
)
from ..serialization.remote_code.source_text import packages_of
from ..serialization.upload import push_files

logger = logging.getLogger(__name__)

CONFIG = "graft_operator.json"
_FORMAT = 1
_TEXTS = ("operator", "file", "sha256")


def push_operator(
    operator: str | OperatorConfig, repo_id: str, *, license: str | None = None, **hub_arguments: Any
) -> str:
    """Check an operator, and upload it to the Hub: its source, what it passed, and a card.

    Args:
        operator: as a rule takes it, a name or a `Config`; the settings are those that are checked.
        repo_id: the repository, `user/name`.
        license: the id of the license that its source has.
        hub_arguments: `private`, `token`, `commit_message`, `create_pr` and `revision`.

    Returns the address of the commit. Raises `ConformanceError` for an operator that fails a check, `FileError` where
    its source cannot be shared by itself or the Hub refuses, `UnknownNameError` for a license that the Hub does not
    know.

        dg.hub.push_operator("token_roll", "me/token-roll", license="apache-2.0")
    """
    check_license(license)
    config = operators.configure(operator)
    reports = {kind: check_operator(config, kind=kind) for kind in config.owner.kinds}
    with tempfile.TemporaryDirectory() as folder:
        _write_operator(Path(folder), config, reports, repo_id, license)
        hub_arguments.setdefault("commit_message", f"Upload the operator {config.owner.name}")
        return push_files(Path(folder), repo_id, [CONFIG, CARD, file_of(config.owner.name)], **hub_arguments)


def _write_operator(
    folder: Path, config: OperatorConfig, reports: dict[str, Report], repo_id: str, license: str | None
) -> None:
    owner = config.owner
    file = file_of(owner.name)
    source = source_text(owner, may_need_packages=True)
    packages = packages_of(source)
    metadata = ModelCardData(
        library_name="diffusers-graft",
        tags=["diffusers", "diffusers-graft", "diffusers-graft-operator", owner.name],
        license=license,
    )
    card = template("operator_card").render(
        front_matter=metadata.to_yaml(),
        name=owner.name,
        summary=_summary(owner),
        repo_id=repo_id,
        kinds=owner.kinds,
        settings=config,
        start=owner.start,
        file=file,
        packages=[f"{name}=={number}" for name, number in packages.items()],
        reports=reports,
        paper=owner.paper,
        citation=citation(owner.paper) if owner.paper else "",
        versions=versions(),
    )
    write_text(folder / file, source)
    write_text(folder / CARD, add_note(card))
    described = {
        "format": _FORMAT,
        "operator": owner.name,
        **describe_code({file: source})[owner.name],
        "packages": packages,
        "versions": versions(),
        "conformance": {
            "config": config.to_dict(),
            "passed": {kind: list(report.passed) for kind, report in reports.items()},
        },
    }
    write_json(folder / CONFIG, described)


def _summary(operator: type[Operator]) -> str:
    """Return the first line of a class's own documentation, empty without one."""
    own = vars(operator).get("__doc__") or ""
    return next(iter(own.strip().splitlines()), "")


def load_operator(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> type[Operator]:
    """Run and register the operator of a repository, or of a folder; `dg.operators.get` calls this.

    Raises `FileError` for a repository that is not trusted, not pinned, or that holds no operator as `push_operator`
    writes it; `MissingDependencyError` for a package that it needs.
    """
    pinned = is_pinned(source, revision)
    # Before anything is downloaded.
    if not (trust_remote_code and pinned):
        raise FileError(
            f"{source} would bring an operator as code that runs on this machine. Read the code first; to run it pass "
            f"{missing_permission(trust=trust_remote_code, pinned=pinned)} to dg.operators.get."
        )
    folder = local_folder(source, [CONFIG, "graft_operator_*.py"], revision=revision)
    described = _read_description(folder, source)
    name = described["operator"]
    if name in operators.available():
        if hash_of(name) != described["sha256"]:
            raise FileError(
                f"{source} brings the operator {name!r}, and there is another of that name. Load it in a new process, "
                "or ask its author for another name."
            )
        return operators.get(name)
    _require_packages(name, described["packages"])
    operator = register(run_operator(name, described, folder))
    if revision is not None:
        note_repository(operator, source, revision)
    return operator


def _read_description(folder: Path, source: str) -> dict[str, Any]:
    """Return the description of an operator. Raises `FileError` where there is none, or a damaged one."""
    if not (folder / CONFIG).exists():
        raise FileError(f"{source} holds no operator: there is no {CONFIG}. It is written by dg.hub.push_operator.")
    described = read_json(folder / CONFIG)
    packages = described.get("packages")
    is_sound = isinstance(packages, dict) and all(isinstance(number, str) for number in packages.values())
    if not is_sound or not all(isinstance(described.get(name), str) for name in _TEXTS):
        raise FileError(f"{CONFIG} of {source} is damaged: it is not what dg.hub.push_operator writes.")
    if described.get("format") != _FORMAT:
        raise FileError(
            f"{source} has format {described.get('format')!r}; this version of diffusers-graft reads {_FORMAT}. "
            "Upgrade: pip install -U diffusers-graft"
        )
    return described


def _require_packages(name: str, packages: dict[str, str]) -> None:
    """Raise `MissingDependencyError` for a package that is missing; warn of one of another version."""
    for package, wanted in packages.items():
        try:
            here = version(package)
        except (PackageNotFoundError, ValueError) as error:
            raise MissingDependencyError(f"The operator {name!r}", f"{package} {wanted}") from error
        if here != wanted:
            logger.warning(
                f"The operator {name!r} was shared with {package} {wanted}; here is {here}. "
                f'Where it fails: pip install "{package}=={wanted}"'
            )
