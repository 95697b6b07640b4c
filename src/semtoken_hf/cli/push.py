"""`semtoken push`: a checkpoint goes to the Hub in one commit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..publishing.push import Package, Publication, prepare, push
from .main import CONTEXT
from .options import Json, Quiet
from .output import bars, console, ending_well, only_json

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command("push", context_settings=CONTEXT)
def push_to_hub(
    folder: Annotated[Path, typer.Argument(help="of a converted (and perhaps adapted) checkpoint")],
    repo_id: Annotated[str, typer.Argument(help="user/name or organisation/name")],
    public: Annotated[
        bool, typer.Option("--public", help="a new repository is public, an existing one may be")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="branch; a new one starts from main; main if unset")
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="HF_TOKEN, or the one of `hf auth login`, if unset")
    ] = None,
    commit_message: Annotated[
        str | None, typer.Option("--commit-message", help='"Upload SemToken checkpoint" if unset')
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only show what would be sent; asks nothing of the Hub")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Send a checkpoint to the Hub: one commit, to a private repository unless `--public` says otherwise.

    Sent are the weights (safetensors), configurations, tokenizer, modules, adapter, licence, and the card (README.md)
    with the images and documents that it shows or links to; nothing else ever is. A folder that would not load is
    refused. `semtoken evaluate --update-card FOLDER` puts an evaluation into the card first.

    **Examples**

        semtoken push my-semtoken me/llama-3.2-1b-semtoken --dry-run
        semtoken push my-semtoken me/llama-3.2-1b-semtoken --public --revision adapted

    **Exit codes**: 0 pushed, or there already; 1 the folder is not whole or the Hub refuses; 2 wrong usage; 130 Ctrl-C.
    """
    left = "the repository holds all of the commit or nothing of it; start again, what was uploaded is not sent twice"
    with ending_well(left), only_json(as_json) as answer, bars(quiet):
        package = prepare(folder, repo_id)
        sent = {"files": package.sizes, "bytes": sum(package.sizes.values()), "left_out": package.selection.left_out}
        if dry_run:
            answer({"repo_id": repo_id, "dry_run": True, **sent, "card": package.card})
            if not as_json:
                show_package(package, console())
            return
        done = push(package, public, revision, token, commit_message)
        answer({**vars(done), "dry_run": False, **sent})
        if not as_json:
            show_publication(done, public, console())


def show_package(package: Package, show: Console) -> None:
    """Files with their sizes, what stays behind and why, and the card."""
    sizes = package.sizes
    for path, size in sizes.items():
        show.print(f"{size:>15,}  {path}")
    show.print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files", style="bold")
    show.print("\nleft out:")
    for line in [f"  {path}: {reason}" for path, reason in package.selection.left_out.items()] or ["  nothing"]:
        show.print(line)
    title = "README.md:" if package.has_own_card else "README.md, unless the repository has one already:"
    show.print(f"\n{title}\n\n{package.card}")


def show_publication(done: Publication, public: bool, show: Console) -> None:
    """Where it went and how to load exactly this."""
    where = f"{done.repo_id} ({'private' if done.private else 'public'}), branch {done.branch}, commit {done.sha}"
    show.print(f"{'pushed to' if done.changed else 'nothing has changed in'} {where}")
    if done.deleted:
        show.print(f"deleted what an earlier checkpoint had left there: {', '.join(done.deleted)}")
    if public and done.private:
        show.print("the repository existed and stays private: its settings on the Hub make it public")
    load = f'.from_pretrained("{done.repo_id}", revision="{done.sha}", trust_remote_code=True)'
    show.print(f"\npinned to this commit:\n  AutoModelForCausalLM{load}\n  AutoTokenizer{load}")
