"""`doublehead analyze heads`: the heads of all kinds, trained side by side on a frozen detector's RoIs.

With backbone and RPN frozen, the heads of a detector are independent of each other given the pooled RoIs.  So each
distinct head (`specs`) is trained once, from features computed once (`features`), on the very same RoIs as all others
(`training`), and every kind is put together at evaluation (`reading`).  `record` writes what came out.
"""
