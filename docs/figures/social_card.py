"""Draws the card that other sites show for a link to ours, from the logo.

python docs/figures/social_card.py  # needs Chromium
"""

import pathlib
import subprocess
import tempfile

HERE = pathlib.Path(__file__).parent
PAGE = """<body style="margin: 0; display: grid; grid-template-columns: 420px 1fr;
align-items: center; width: 1200px; height: 630px; background: #fff; color: #1a1a2e;
font-family: sans-serif"><img src="{logo}" width="330" style="margin-left: 70px">
<div style="padding-right: 70px"><div style="font-size: 84px; font-weight: bold">
flowdiffrax</div><div style="font-size: 36px; line-height: 1.4; margin-top: 24px">{what}
</div></div>"""
WHAT = "Flow maps of ODEs as Equinox modules, and as learned solvers for Diffrax"


def main():
    logo = (HERE.parent / "site" / "logo.svg").as_uri()
    with tempfile.TemporaryDirectory() as folder:
        page = pathlib.Path(folder) / "card.html"
        page.write_text(PAGE.format(logo=logo, what=WHAT))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-sync"]
        options += [f"--user-data-dir={folder}/profile", "--hide-scrollbars"]
        options += ["--window-size=1200,630"]
        picture = f"--screenshot={HERE / 'social_card.png'}"
        subprocess.run(["chromium", *options, picture, page.as_uri()], check=True)


if __name__ == "__main__":
    main()
