"""Are code points and names brought into one form, and families told by them?"""

from __future__ import annotations

import pytest

from data_pipelines.emoji_icons import slug
from data_pipelines.emoji_names import family_of, gender_of, has_skin_tone
from data_pipelines.emoji_packages import normalize, tarball_name


@pytest.mark.parametrize(
    ("codepoints", "family", "gender", "toned"),
    [
        ("1f34e", "1f34e", None, False),
        ("1f44b-1f3fd", "1f44b", None, True),
        ("1f469-1f3fd-200d-1f3eb", "1f9d1-200d-1f3eb", "female", True),  # woman teacher
        ("1f468-200d-1f3eb", "1f9d1-200d-1f3eb", "male", False),
        ("1f3c3-1f3ff-200d-2640", "1f3c3", "female", True),  # woman running
        ("1f3c3-200d-2642-200d-27a1", "1f3c3-200d-27a1", "male", False),  # facing right
        ("1f468-200d-1f469-200d-1f466", "1f9d1-200d-1f9d1-200d-1f9d2", None, False),
        ("2640", "2640", "female", False),  # the sign itself
        ("1f3fb", "1f3fb", None, True),  # the swatch itself
    ],
)
def test_families(codepoints: str, family: str, gender: str | None, toned: bool) -> None:
    assert family_of(codepoints) == family
    assert gender_of(codepoints) == gender
    assert has_skin_tone(codepoints) == toned


def test_names() -> None:
    assert normalize("0031-FE0F-20E3") == normalize("31-fe0f-20e3") == "0031-20e3"
    assert normalize("1f3f4-e0067_e0062") == "1f3f4-e0067-e0062"
    assert slug("flag: Côte d’Ivoire") == "flag-cote-divoire"
    assert slug("A button (blood type)") == "a-button-blood-type"
    assert tarball_name("@a/b-c@1.2.3") == "a-b-c-1.2.3.tgz"
