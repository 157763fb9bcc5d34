"""`python -m meal_fast.report RUN`: see meal_fast.evaluation.report."""

from meal_fast.evaluation.report import main

if __name__ == "__main__":
    main()
