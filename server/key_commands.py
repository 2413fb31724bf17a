"""The verbs ``guided keys ...``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

keys_app = typer.Typer(help="API keys: make them, list them.", no_args_is_help=True)


@keys_app.command()
def new(
    name: Annotated[str, typer.Argument(help="What to call it: it is written into jobs and refusals.")],
    scopes: Annotated[
        list[str] | None, typer.Option("--scope", help="generate, train or admin; may be repeated.")
    ] = None,
    rate_limit: Annotated[str | None, typer.Option(help="Requests per time, such as '60/minute'.")] = None,
    images_per_day: Annotated[int | None, typer.Option(help="Pictures in a day.")] = None,
    steps_per_day: Annotated[int | None, typer.Option(help="Denoising steps of all pictures in a day.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Make a key. It is shown once; what the server's settings need is its hash."""
    from server.keys import ApiKey, hashed, new_key

    key = new_key()
    entry = ApiKey.model_validate(
        {
            "name": name,
            "hash": hashed(key),
            "scopes": scopes or ["generate"],
            "rate_limit": rate_limit,
            "images_per_day": images_per_day,
            "steps_per_day": steps_per_day,
        }
    ).model_dump(mode="json", exclude_none=True)
    if as_json:
        print(json.dumps({"key": key, "entry": entry}, indent=2))
        return
    lines = "\n".join(f"{field} = {json.dumps(value)}" for field, value in entry.items())
    print(
        "The key, shown this once; clients send it as 'Authorization: Bearer ...' (ours take GUIDED_API_KEY):"
        f"\n\n{key}\n\n"
        f"For the server's guided.toml, after all settings outside of tables:\n\n[[api_keys]]\n{lines}\n\n"
        f"Or, for GUIDED_API_KEYS, in a JSON list:\n\n{json.dumps(entry)}"
    )


@keys_app.command("list")
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """List the keys the settings here know: names and scopes, as nobody has the keys themselves."""
    from server.settings import ServerSettings

    known = ServerSettings().api_keys
    if as_json:
        print(json.dumps([key.model_dump(mode="json", exclude={"hash"}, exclude_none=True) for key in known], indent=2))
        return
    print("\n".join(f"{key.name}  {', '.join(key.scopes)}" for key in known) or "No keys.")
