"""Recordings and texts become a corpus.

`recordings.prepare_audio` and `texts.prepare_text` are the entry points; a recipe lists what they get as `Recording`
or `text_blocks.Text`. workers.py is what both share: worker processes, and a corpus that is made once and whole.
audio_report.py and text_tables.py say what was found; download.py fetches data sets.
"""
