"""The command line: `w2w VERB`, thin; each command parses, loads, calls the verb and writes.

Nothing here imports torch before a command runs, so that `w2w --help` is quick. What is wrong
with the input is found before the work starts, and outputs are written whole, at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from . import collect, evaluate, generate, invert, learn, look, people, populate
from . import options as opt
from . import support as shared

app = typer.Typer(
    cls=shared.Group,
    name="w2w",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Weight spaces of customised diffusion models: sample, edit, invert and generate people.",
    epilog="First: [bold]w2w demo[/bold]. SPACE is a folder, or [bold]demo[/bold], the small "
    "world that ships with w2w_fast: [bold]w2w generate demo --sample 8 --out people[/bold]",
)


def command(name: str, panel: str, *examples: str) -> Any:
    """`app.command` with examples under its help."""
    epilog = "\n\n".join(("[bold]Examples[/bold]", *(f"  {example}" for example in examples)))
    return app.command(name, epilog=epilog, rich_help_panel=panel)


@app.callback()
def _options(version: opt.Version = False) -> None:
    pass


MAKE, USE, FILES, HELP = "Make a space", "Use a space", "Files of other tools", "Look around"


command(
    "populate",
    MAKE,
    "w2w populate photos/ population/ --base sd15/ --vram 20GiB --bf16",
    "w2w populate photos/ population/ --base sd15/ --resume",
    "w2w populate listing.csv population/ --base sd15/ --labels labels.csv --ray local",
    "w2w populate photos/ population/ --base demo --train B --start first/ --batch 32 --prior 0",
)(populate.populate)
command(
    "collect",
    MAKE,
    "w2w collect loras/ population/ --base sd15/ --rank 4 --targets to_q,to_k,to_v,to_out.0",
    "w2w collect loras/ population/ --layout-of space/ --labels labels.csv",
)(collect.collect)


command(
    "fit",
    MAKE,
    "w2w fit population/ space/ --components 1000 --labels labels.csv --base sd15/",
    "w2w fit population/ space/ --components auto --method logistic",
    "w2w fit more-people/ bigger-space/ --add space/ --check population/",
    "torchrun --nproc-per-node 2 -m w2w_fast fit population/ space/ --components 1000",
)(learn.fit)


command(
    "directions",
    MAKE,
    "w2w directions demo",
    "w2w directions space/ smiling/ --labels smiles.csv --method logistic",
)(people.directions)


@command("quantize", MAKE, "w2w quantize celeba/ celeba-int8/ --to int8")
def quantize(
    space: opt.SpaceArg,
    out: opt.SpaceOut,
    to: Annotated[str, typer.Option(metavar="int8|int4", help="How a number is stored.")] = "int8",
    overwrite: opt.Overwrite = False,
) -> None:
    """Store a space's basis in 8 or 4 bits: half or a quarter of its size, and faster to read."""
    shared.new_folder(out, overwrite, "space.json")
    made = shared.open_space(space).quantize(to)
    made.save(out, overwrite=overwrite)
    error = made.meta["quantized"]["relative_error"]
    typer.echo(f"{out}: {to}, rms error {error:.2%} of the adapters' spread")


@command(
    "sample",
    USE,
    "w2w sample demo --n 16 --seed 1 --out people.safetensors",
    "w2w sample space/ --n 4 --factor 0.7",
    "w2w sample demo --n 8 --given beard=1,glasses=0 --novelty",
)
def sample(
    space: opt.SpaceArg,
    n: Annotated[int, typer.Option("--n", min=1, max=1_000_000, help="How many people.")] = 1,
    seed: opt.Seed = 0,
    factor: Annotated[float, typer.Option(help="Below 1 more average, above 1 less.")] = 1.0,
    given: Annotated[
        str, typer.Option(help="attribute=label,...: everybody reads as people with that label do.")
    ] = "",
    covariance: Annotated[
        str, typer.Option(metavar="diagonal|full", help="full: that of the space's people.")
    ] = "diagonal",
    method: Annotated[
        str, typer.Option(metavar="random|latin", help="latin: evenly spread, rows depend on n.")
    ] = "random",
    novelty: Annotated[
        bool, typer.Option("--novelty", help="Say how far they are from anybody in the population.")
    ] = False,
    population: people.Population = None,
    out: opt.PeopleOut = Path("coefficients.safetensors"),
    overwrite: opt.Overwrite = False,
) -> None:
    """People who do not exist: coefficients drawn like the population's."""
    shared.new_file(out, overwrite)
    from ..coefficients import write_coefficients
    from ..verbs.sample import parse_given
    from ..verbs.sample import sample as verb
    from ..whereabouts import novelty as distances

    labels = parse_given(given)
    opened = people.open_with_people(space, population)
    options = {"factor": factor, "covariance": covariance, "method": method, "given": labels}
    made = verb(opened, n, seed=seed, **options)
    told = distances(opened, made) if novelty else ""
    write_coefficients(out, made)
    typer.echo(f"{out}: {n} people, {opened.m} coefficients each")
    if novelty:
        typer.echo(told)


@command(
    "edit",
    USE,
    'w2w edit demo people.safetensors --set "beard=+2" --out bearded.safetensors',
    'w2w edit demo people.safetensors --set "age=+1.5,hold=glasses" --out older.safetensors',
)
def edit(
    space: opt.SpaceArg,
    coefficients: opt.PeopleArg,
    set_: Annotated[
        str,
        typer.Option("--set", help="attribute=amount,...: standard deviations; hold=attribute."),
    ],
    scale: Annotated[
        list[Path] | None,
        typer.Option(help="Of `w2w calibrate`: that attribute's amount is a measured change."),
    ] = None,
    out: opt.PeopleOut = Path("edited.safetensors"),
    overwrite: opt.Overwrite = False,
) -> None:
    """Move people along attributes, in population standard deviations; hold others still."""
    shared.new_file(out, overwrite)
    from ..coefficients import read_coefficients, write_coefficients
    from ..verbs import edit as verb
    from ..verbs.calibrate import Scale

    amounts, hold = verb.parse_amounts(set_)
    if not amounts:
        raise InputError('--set: wanted at least one attribute=amount, as in "beard=+1.5"')
    opened = shared.open_space(space)
    made = read_coefficients(coefficients, opened.m)
    for path in scale or ():
        known = Scale.load(path)
        if known.name not in amounts:
            raise InputError(f"--scale: {path} is of {known.name}, which --set does not name")
        amount = {known.name: float(known.amount(amounts.pop(known.name)))}
        made = verb.edit(opened, made, amount, hold=[*known.hold, *hold])
    made = verb.edit(opened, made, amounts, hold=hold)
    write_coefficients(out, made)
    typer.echo(f"{out}: {len(made)} people edited: {set_}")


command(
    "read",
    USE,
    "w2w read demo people.safetensors --map map.png --shade beard",
    "w2w read space/ anna.safetensors loras/ --out people.parquet",
)(people.read)
command(
    "blend",
    USE,
    "w2w blend demo people.safetensors people.safetensors --rows 0 1 --strip strip.png",
    "w2w blend space/ anna.safetensors bert.safetensors --method spherical",
)(people.blend)
command(
    "calibrate",
    USE,
    "w2w calibrate demo skin --out skin.json",
    "w2w edit demo people.safetensors --set skin=+0.2 --scale skin.json",
)(people.calibrate)
command(
    "invert",
    USE,
    "w2w invert demo me.png --mask face.png --out me.safetensors --report me",
    "w2w invert space/ anna.jpg photos-of-bert/ --base sd15/ --auto-mask --vram 12GiB --bf16",
    "w2w invert space/ portraits/*.jpg --base sd15/ --paper --check 25",
)(invert.invert)


command(
    "generate",
    USE,
    'w2w generate demo --sample 8 --prompts "sks person, at the beach" --out beach',
    "w2w generate demo --identities people.safetensors --edits beard=+2,hold=age --start 700",
    "w2w generate space/ --sample 1000 --prompts prompts.txt --per-identity 4 --format tar",
    "w2w generate space/ --out images --resume",
)(generate.generate)


command(
    "evaluate",
    HELP,
    "w2w evaluate demo --out report",
    "w2w evaluate demo --out quick --short --section edits --section sampling",
)(evaluate.evaluate)


@command(
    "export",
    FILES,
    "w2w export demo people.safetensors me.safetensors --row 2 --verify",
    "w2w export space/ me.safetensors me-peft --format peft --strength 0.8",
)
def export(
    space: opt.SpaceArg,
    coefficients: opt.PeopleArg,
    out: Annotated[Path, typer.Argument(help="A .safetensors file; for peft a folder.")],
    row: Annotated[int, typer.Option(min=0, help="Which person of the file.")] = 0,
    format: Annotated[str, typer.Option(metavar="kohya|diffusers|peft")] = "kohya",
    strength: Annotated[float, typer.Option(help="Written into the file.")] = 1.0,
    verify: Annotated[bool, typer.Option("--verify", help="Load it with diffusers first.")] = False,
    base: opt.OwnBase = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Write a person as a LoRA for ComfyUI, A1111, sd-scripts, diffusers or PEFT."""
    shared.new_lora(out, overwrite, format)
    from ..coefficients import read_coefficients

    opened = shared.open_space(space)
    people = read_coefficients(coefficients, opened.m)
    if row >= len(people):
        raise InputError(f"--row: {coefficients} has rows 0 to {len(people) - 1}, got {row}")
    pipe = shared.open_pipeline(base, opened, "cpu") if verify else None
    options: dict[str, Any] = {"format": format, "strength": strength}
    shared.write_lora(opened, people[row], out, overwrite, pipe, **options)
    typer.echo(f"{out}: {format} LoRA of person {row}, {len(opened.layout.modules)} modules")


command(
    "slider",
    FILES,
    'w2w slider demo beard.safetensors --set "beard=+2,hold=age" --verify',
    "w2w slider space/ annas-beard.safetensors --set beard=+2 --of anna.safetensors",
)(people.slider)


@command("import", FILES, "w2w import someone.safetensors space/ --out someone-c.safetensors")
def import_(
    adapter: Annotated[Path, typer.Argument(help="A LoRA file or a PEFT folder.")],
    space: opt.SpaceArg,
    out: opt.PeopleOut = Path("imported.safetensors"),
    overwrite: opt.Overwrite = False,
) -> None:
    """Read a LoRA of another tool and project it into a space."""
    shared.new_file(out, overwrite)
    from .. import formats
    from ..coefficients import write_coefficients
    from ..whereabouts import outside

    read = formats.read_adapter(adapter)
    opened = shared.open_space(space)
    w = formats.for_space(read, opened)
    c = opened.project(w)
    write_coefficients(out, c)
    kept = 1 - float(outside(opened, w, c))
    n = len(opened.layout.modules)
    typer.echo(f"{out}: {read.format} LoRA, {n}/{n} modules; the space keeps {kept:.1%} of it")


@command(
    "import-published",
    FILES,
    "w2w import-published weights2weights/ celeba/ --components 1000 --allow-pickle",
    "w2w import-published weights2weights/ celeba-int8/ --components 10000 --dtype int8 "
    "--allow-pickle",
)
def import_published(
    folder: Annotated[Path, typer.Argument(help="With V.pt, mean.pt, std.pt, ...")],
    out: opt.SpaceOut,
    components: Annotated[int, typer.Option(min=1, max=10_000)] = 1000,
    labels: Annotated[Path | None, typer.Option(help="CSV or Parquet.")] = None,
    dtype: Annotated[
        str, typer.Option(metavar="bf16|int8", help="How a number of the basis is stored.")
    ] = "bf16",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="The files are pickles: only if you trust them.")
    ] = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Convert the paper's published files to a space."""
    shared.new_folder(out, overwrite, "space.json")
    from .. import formats
    from ..files import atomic_dir

    options = {
        "components": components, "labels": labels, "dtype": dtype, "allow_pickle": allow_pickle,
    }  # fmt: skip
    with atomic_dir(out, overwrite=overwrite) as temporary:
        made = formats.import_published(folder, temporary, **options)
    people = f"{made.n} people" if made.n else "statistics, but no people's coefficients"
    typer.echo(f"{out}: {made.m} components, {people}")
    if repaired := made.meta.get("negative_std"):
        typer.echo(f"std: {repaired} negative numbers, negated with their rows of the basis")
    if quantized := made.meta.get("quantized"):
        typer.echo(f"{dtype}: rms error {quantized['relative_error']:.2%} of the adapters' spread")
    shared.show_readers(made)


command("info", HELP, "w2w info demo", "w2w info people.safetensors", "w2w info lora.safetensors")(
    look.info
)
command("doctor", HELP, "w2w doctor")(look.doctor)
command("demo", HELP, "w2w demo", "w2w demo --photo me.jpg --out my-demo")(look.demo)
command("bench", HELP, "w2w bench", "w2w bench reconstruct merge --out bench.json")(look.bench)


def main() -> None:
    """The entry point of the command `w2w`."""
    app()


if __name__ == "__main__":
    main()
