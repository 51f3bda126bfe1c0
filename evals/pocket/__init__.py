"""The pocket suites and the weights of the pocket models: scenes, questions, clips, committed data.

In: seeds. Out: samples whose every answer knows the boxes that suffice for it.
"""
