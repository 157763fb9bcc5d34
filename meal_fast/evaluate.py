"""`python -m meal_fast.evaluate RUN`: see meal_fast.evaluation.evaluator."""

from meal_fast.evaluation.evaluator import main

if __name__ == "__main__":
    main()
