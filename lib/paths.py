"""Where things are. Nothing else in the project spells out a folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"  # 01_dataset.ipynb and so on, committed without outputs
PROFILES = ROOT / "profiles"  # every setting, with its unit and why
OPINIONS = ROOT / "data" / "opinions"  # topics, voices, train.csv, test.csv, datasheet
VOICES = OPINIONS / "voices"  # clause frames, one CSV a voice
PAPER = ROOT / "data" / "paper"  # what the paper and its predecessor report
FIGURES = ROOT / "figures"  # figures/<profile>/: figures, tables, gallery
RESULTS = ROOT / "results"  # results/<profile>/: artefacts and executed notebooks, git-ignored
