"""`rung label`: the page on which people label answers, and what they said."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rung.cli.options import AsJson, show_result

label_app = typer.Typer(help="Let people rank, compare, rate or correct answers on a page.", no_args_is_help=True)

LabelKind = Literal["rank", "compare", "rate", "correct"]
COMMANDS: dict[LabelKind, str] = {
    "rank": "Rank the answers to each prompt, with ties.",
    "compare": "Compare answers in pairs: one is better, a tie, or both are bad.",
    "rate": "Rate single answers on a scale.",
    "correct": "Edit answers into right ones, as rows for supervised training.",
}
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        help="Answers: a file of rung generate or with rows of any format, a run or a climb. With several, each is a "
        "system. None: open the folder again.",
        metavar="[FILE]...",
    ),
]
Folder = Annotated[Path, typer.Option("--output", "-o", help="Folder of the labels; the same command opens it again.")]
People = Annotated[int, typer.Option(min=1, help="People, each with a link.")]
Names = Annotated[str | None, typer.Option(help="Names of the people, with commas between them.")]
Overlap = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of the tasks that every person gets; default: 0.2, for correct 0."),
]
Repeat = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of a person's tasks that come a second time; default: 0.05, for correct 0."),
]
Scale = Annotated[int | None, typer.Option(min=2, max=10, help="rate only: highest score; default: 5.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Label the first items only.")]
Guide = Annotated[str, typer.Option(help="What people are told: what a good answer is.")]
Seed = Annotated[int, typer.Option(help="Seed of assignments and orders.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: a free one.")]
Host = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: people on other machines too.")]
Url = Annotated[str | None, typer.Option(help="Address in the links, where the page is behind a proxy.")]


def _add_command(kind: LabelKind, text: str) -> None:
    @label_app.command(kind, help=text)
    def command(  # noqa: PLR0913 -- options of a command line, each named where it is given
        output: Folder,
        sources: Sources = None,
        people: People = 1,
        names: Names = None,
        overlap: Overlap = None,
        repeat: Repeat = None,
        scale: Scale = None,
        guide: Guide = "",
        limit: Limit = None,
        seed: Seed = 0,
        port: Port = 0,
        host: Host = "127.0.0.1",
        url: Url = None,
    ) -> None:
        from rung.labeling.run import LabelRequest, PageRequest, label

        people_names = tuple(name.strip() for name in names.split(",")) if names else ()
        request = LabelRequest(
            kind, tuple(sources or ()), people, people_names, overlap, repeat, scale, guide, limit, seed
        )
        label(output, request, PageRequest(host, port, url))


for _kind, _text in COMMANDS.items():
    _add_command(_kind, _text)


@label_app.command()
def result(
    source: Annotated[
        str, typer.Argument(help="Folder of labels, or a file that another tool exported.", metavar="DIR")
    ],
    export: Annotated[
        str | None,
        typer.Option(help="Write rows: ranked, preference, rated, sft, human_labels, arena, argilla or label_studio."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File of the export.")] = None,
    min_people: Annotated[int, typer.Option(min=1, help="Export what at least so many people labeled.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Report agreement, consistency, bias and preferences of people, and export what they said."""
    from rung.human_labels.report import label_lines
    from rung.human_labels.result import label_result

    found = label_result(source, export=export, output=output, min_people=min_people)
    show_result(found.to_json(), label_lines(found), as_json)
