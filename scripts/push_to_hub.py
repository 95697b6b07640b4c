#!/usr/bin/env python
"""Push a converted checkpoint to the Hub, as one commit to a private repository.

    python scripts/push_to_hub.py llama-3.2-1b-semtoken me/llama-3.2-1b-semtoken --dry_run   # what would go
    python scripts/push_to_hub.py llama-3.2-1b-semtoken me/llama-3.2-1b-semtoken --public --revision adapted

Sent are the weights (safetensors), configurations, tokenizer, modules, adapter, licence, and the card (README.md) with
the images and documents that it shows or links to; nothing else ever is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars

from semtoken_hf.publishing.push import Package, Publication, prepare, push


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a converted (and perhaps adapted) checkpoint")
    parser.add_argument("repo_id", help="user/name or organisation/name")
    parser.add_argument("--public", action="store_true", help="a new repository is public, an existing one may be")
    parser.add_argument("--revision", help="branch; a new one starts from main (default main)")
    parser.add_argument("--token", help="default: HF_TOKEN, or the one of `hf auth login`")
    parser.add_argument("--commit_message", help='default "Upload SemToken checkpoint"')
    parser.add_argument("--dry_run", action="store_true", help="only print what would be sent; asks nothing of the Hub")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def describe(package: Package) -> str:
    """Files with their sizes, what stays behind and why, and the card."""
    sizes = package.sizes
    rows = [f"{size:>15,}  {path}" for path, size in sizes.items()]
    total = f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files"
    left_out = [f"  {path}: {reason}" for path, reason in package.selection.left_out.items()] or ["  nothing"]
    card = "README.md:" if package.has_own_card else "README.md, unless the repository has one already:"
    return "\n".join([*rows, total, "", "left out:", *left_out, "", card, "", package.card])


def report(done: Publication, public: bool) -> str:
    """Where it went and how to load exactly this."""
    where = f"{done.repo_id} ({'private' if done.private else 'public'}), branch {done.branch}, commit {done.sha}"
    lines = [f"{'pushed to' if done.changed else 'nothing has changed in'} {where}"]
    if done.deleted:
        lines.append(f"deleted what an earlier checkpoint had left there: {', '.join(done.deleted)}")
    if public and done.private:
        lines.append("the repository existed and stays private: its settings on the Hub make it public")
    load = f'.from_pretrained("{done.repo_id}", revision="{done.sha}", trust_remote_code=True)'
    return "\n".join([*lines, "", "pinned to this commit:", f"  AutoModelForCausalLM{load}", f"  AutoTokenizer{load}"])


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    if options.quiet:
        disable_progress_bars()
    try:
        package = prepare(options.folder, options.repo_id)
        if options.dry_run:
            print(describe(package))
            return
        done = push(package, options.public, options.revision, options.token, options.commit_message)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(report(done, options.public))


if __name__ == "__main__":
    main()
