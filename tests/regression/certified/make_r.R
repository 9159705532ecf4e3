# Certified values for tests/test_regression.py, made by R with the packages sandwich and car.
#   Rscript tests/regression/certified/make_r.R > tests/regression/certified/r_output.json
# The data are made by a formula, so that Python needs no file of others' data; three groups stand
# for sources, and the first model has their dummies and no constant, as the study's main fit.
suppressPackageStartupMessages({library(sandwich); library(car)})

i <- 1:40
x1 <- sin(1.7 * i) + 0.02 * i
x2 <- cos(2.3 * i) + 0.5 * sin(1.7 * i)
x3 <- sin(0.9 * i)^3
g <- factor(1 + (i %% 3))
y <- 0.3 * x1 - 0.2 * x2 + 0.1 * as.integer(g) + 0.15 * (0.5 + abs(x1)) * sin(5.1 * i)

numbers <- function(v) paste0("[", paste(sprintf("%.17g", as.numeric(v)), collapse = ", "), "]")
model <- function(fit) {
  parts <- c(coef = numbers(coef(fit)),
             se = numbers(sqrt(diag(vcov(fit)))),
             hc3 = numbers(vcovHC(fit, type = "HC3")),
             cook = numbers(cooks.distance(fit)),
             leverage = numbers(hatvalues(fit)),
             studentised = numbers(rstandard(fit)),
             residual_sd = sprintf("%.17g", sigma(fit)))
  paste0("{", paste0('"', names(parts), '": ', parts, collapse = ",\n    "), "}")
}

groups <- lm(y ~ 0 + g + x1 + x2 + x3)
plain <- lm(y ~ x1 + x2 + x3)
economy <- lm(Employed ~ ., data = longley)
versions <- sprintf('"R": "%s", "sandwich": "%s", "car": "%s"', getRversion(),
                    packageVersion("sandwich"), packageVersion("car"))
cat("{\n  \"made_by\": {", versions, "},\n", sep = "")
cat('  "y": ', numbers(y), ",\n", sep = "")
cat('  "groups": ', model(groups), ",\n", sep = "")
cat('  "plain": ', model(plain), ",\n", sep = "")
cat('  "plain_vif": ', numbers(vif(plain)), ",\n", sep = "")
cat('  "longley_hc3_se": ', numbers(sqrt(diag(vcovHC(economy, type = "HC3")))), ",\n", sep = "")
cat('  "longley_vif": ', numbers(vif(economy)), ",\n", sep = "")
cat('  "longley_cook": ', numbers(cooks.distance(economy)), "\n}\n", sep = "")
