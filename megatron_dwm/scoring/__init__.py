"""Scores a corpus, document by document, with a trained weighting model.

`documents` splits a corpus into chunks, windows and batches, `model_loading` and `huggingface` load
the model, `work_folder` keeps the scores of finished chunks so that a killed run can resume, and
`weighing` turns scores into weight files. None of them needs the trainer.
"""
