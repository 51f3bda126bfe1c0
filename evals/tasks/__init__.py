"""What a model is asked: the pocket suites, YAML task files and lmms-eval's tasks, all as `Task`s.

In: a task's name. Out: samples, a rule for right answers, a fingerprint.
"""
