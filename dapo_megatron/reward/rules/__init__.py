"""The grading rules. Each module has `grade(response, answer) -> (correct, extracted)`."""
