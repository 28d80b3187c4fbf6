"""What a card says that no run can measure: licences, language, the grid's carbon intensity. `card.yaml` holds it.

A recipe folder may have one, which `scratch-gpt run` gives to the cards that it writes; `scratch-gpt card` has flags.
Both leave what they used in the model's folder, beside its README.md, so that the folder alone gives the card again.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_scratch_gpt.reporting.ledger import Record
from hf_scratch_gpt.reporting.lineage import last_part
from hf_scratch_gpt.runs import write_text
from hf_scratch_gpt.runs.arguments import read_recipe
from hf_scratch_gpt.runs.files import yaml_text
from hf_scratch_gpt.runs.values import check_recipe_values, nearest

CARD_SETTINGS = "card.yaml"
# The world's average in 2025, in grams of CO2 equivalents a kWh, all stages of generation included.
WORLD_CARBON_INTENSITY = 458.0
WORLD_CARBON_INTENSITY_SOURCE = (
    "average of the world in 2025, Ember, Global Electricity Review 2026, "
    "https://ember-energy.org/latest-insights/global-electricity-review-2026/electricity-demand-and-supply-trends/"
)
# The identifiers that the Hub knows (https://huggingface.co/docs/hub/repositories-licenses); it refuses others.
_HUB_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
lgpl-3.0 isc intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openrail++
openmdw-1.0 osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown
other
"""
HUB_LICENSES = frozenset(_HUB_LICENSES.split())


@dataclasses.dataclass
class CardSettings:
    """What is declared for a card.

    Args:
        license (`str`): The model's licence, an identifier of `HUB_LICENSES`; `other` takes a `license_name` too.
        license_name (`str`, *optional*): Name of a licence that the Hub does not know, or `private`.
        license_link (`str`, *optional*): Where that licence can be read: `LICENSE` or a URL.
        source_licenses (`dict[str, str]`): The licence of each source of data whose licence the run does not know, by
            the source's name as the recipe has it, or the last part of its path. Any text: `cc-by-4.0`, `private`.
        language (`list[str]`, *optional*): ISO 639 codes of the training text, `code` or `multilingual`.
        base_model (`str`, *optional*): Hub id of the model that this one derives from.
        carbon_intensity (`float`, *optional*, defaults to the world's average): Grams of CO2 equivalents a kWh, of
            the grid that the machine drew on.
        carbon_intensity_source (`str`, *optional*): Where that figure is from.
        location (`str`, *optional*): Where the machine stood, as `Quebec, Canada`.
    """

    license: str = ""
    license_name: str = ""
    license_link: str = ""
    source_licenses: dict[str, str] = dataclasses.field(default_factory=dict)
    language: list[str] = dataclasses.field(default_factory=list)
    base_model: str = ""
    carbon_intensity: float = WORLD_CARBON_INTENSITY
    carbon_intensity_source: str = ""
    location: str = ""

    def licence_of(self, source: str) -> str:
        """The licence declared for a source of data, or an empty text."""
        return self.source_licenses.get(last_part(source), "")

    def as_record(self, folder_name: str) -> Record:
        """The settings as the file that `save` writes, for the ledger."""
        return Record(f"{folder_name}/{CARD_SETTINGS}", {k: v for k, v in dataclasses.asdict(self).items() if v})

    def save(self, folder: str | Path) -> Path:
        """Write `card.yaml` to `folder`, atomically."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if value}
        text = yaml_text(settings, width=1000)
        return write_text(
            Path(folder) / CARD_SETTINGS, f"# Declared, not measured: what README.md was made with\n{text}"
        )


def _check(settings: CardSettings, origin: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if settings.license and settings.license not in HUB_LICENSES:
        raise ValueError(
            f"{origin}: 'license' is '{settings.license}', which the Hub does not know"
            f"{nearest(settings.license, sorted(HUB_LICENSES))}; for one of your own give other and a license_name"
        )
    if settings.license == "other" and not settings.license_name:
        raise ValueError(f"{origin}: 'license' is 'other': 'license_name' says which, such as private")
    for code in settings.language:
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", code):
            raise ValueError(
                f"{origin}: 'language' is '{code}', expected an ISO 639 code such as en, code or multilingual"
            )
    if not settings.carbon_intensity > 0:
        raise ValueError(f"{origin}: 'carbon_intensity' is {settings.carbon_intensity}, expected grams a kWh above 0")
    if settings.carbon_intensity == WORLD_CARBON_INTENSITY and not settings.carbon_intensity_source:
        settings.carbon_intensity_source = WORLD_CARBON_INTENSITY_SOURCE
    if not settings.carbon_intensity_source:
        raise ValueError(
            f"{origin}: 'carbon_intensity_source' is missing: say where {settings.carbon_intensity} is from"
        )
    if settings.base_model:
        try:
            validate_repo_id(settings.base_model)
        except HFValidationError as error:
            raise ValueError(f"{origin}: 'base_model' is no Hub id ({error})") from error


def load_settings(*layers: tuple[Mapping[str, Any], str]) -> CardSettings:
    """The settings of several layers, of which later ones win; `source_licenses` are joined.

    Args:
        layers (`tuple[dict, str]`): Settings, and where they are from, for messages.

    Raises:
        ValueError: for an unknown setting or a value that is no good, naming where it is from.
    """
    known = [field.name for field in dataclasses.fields(CardSettings)]
    values: dict[str, Any] = {}
    for given, origin in layers:
        for name in given:
            if name not in known:
                raise ValueError(f"{origin}: unknown setting '{name}'{nearest(str(name), known)}")
        if "carbon_intensity" in given:  # the source of another figure does not go with it
            values.pop("carbon_intensity_source", None)
        checked = check_recipe_values(CardSettings, dict(given), origin)
        licences = {last_part(str(name)): str(value) for name, value in checked.pop("source_licenses", {}).items()}
        values |= checked | {"source_licenses": values.get("source_licenses", {}) | licences}
        _check(CardSettings(**values), origin)
    settings = CardSettings(**values)
    _check(settings, layers[-1][1] if layers else CARD_SETTINGS)
    return settings


def read_settings(folder: str | Path) -> tuple[dict[str, Any], str]:
    """The `card.yaml` of a folder as a layer for `load_settings`; an empty one where there is none."""
    path = Path(folder) / CARD_SETTINGS
    return (read_recipe(path) if path.is_file() else {}), str(path)
