"""General prompts for tuning. They are in none of the benchmarks' suites."""

PROMPTS = (
    "How do I keep bread fresh for longer?",
    "What is the difference between weather and climate?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Give me five ideas for a birthday present for my grandmother.",
    "Explain to a ten-year-old why the sky is blue.",
    "Write a polite email that asks a colleague to move a meeting to Friday.",
    "A pen costs 3 dollars. Anna buys 7 pens and pays with 50 dollars. How much does she get back?",
    "A tank holds 240 litres and loses 8 litres an hour. After how many hours is it half empty?",
    "Solve 3x + 7 = 25 and explain each step.",
    "Write a Python function that reverses the words of a sentence.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "Write a SQL query that lists the ten customers with the highest total of orders.",
    "Summarise how photosynthesis works in three sentences.",
    "List the planets of the solar system with one fact about each.",
    "What should I see in Rome in two days?",
    "Rewrite this sentence so that it is easier to read: The utilisation of bicycles is to be encouraged.",
)
