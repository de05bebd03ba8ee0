"""Questions about images: data sets as one table, answers by ranking, scores with baselines and intervals.

Reads data sets as they are published (datasets.py) into a `QuestionTable`; answers come from prompts (rank.py), from
heads trained in `biomedclip.training.vqa`, or from a file of anybody's predictions; score.py makes every number out
of the two. No torch is imported before a model is asked.
"""
