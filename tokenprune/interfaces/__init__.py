"""What a plug-in derives from or is given: methods, interventions and families meet the engine here only.

In: nothing of the project but kernels, hooks and cost. Out: `Pruner`, `View`, `Selection`, `Signal`, `Intervention`,
`Adapter`, `Visual`, budgets and search spaces.
"""
