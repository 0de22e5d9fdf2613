"""TF-IDF with logistic regression: the baseline metric model, whose weights can be read."""

from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lib import emojis
from lib.errors import UserError


class Tfidf:
    """TF-IDF of words and emojis, multinomial logistic regression; regularisation chosen on validation rows."""

    name = "tfidf"

    def __init__(self, settings, pipeline=None):
        self.settings, self.pipeline = settings, pipeline

    @property
    def traits(self):
        return list(self.pipeline.classes_)

    def fit(self, train, validation):
        """Choose C by accuracy on `validation`, then keep the model fitted to `train`. Raises UserError."""
        s = self.settings
        grams = TfidfVectorizer(
            tokenizer=emojis.tokens,
            token_pattern=None,
            lowercase=True,
            ngram_range=(1, s.tfidf_ngrams),
            min_df=s.tfidf_min_df,
            sublinear_tf=True,
        )
        try:
            counts = grams.fit_transform(list(train["answer"]))
            models = [LogisticRegression(C=c, max_iter=1000).fit(counts, list(train["trait"])) for c in s.tfidf_c]
        except ValueError as error:
            raise UserError(
                f"classifier: too few words in {len(train)} answers for TF-IDF ({error}); lower classifier.tfidf_min_df"
            ) from None
        held = grams.transform(list(validation["answer"]))
        best = max(models, key=lambda m: m.score(held, list(validation["trait"])))
        self.pipeline = make_pipeline(grams, best)
        return self

    def predict_proba(self, texts):
        return self.pipeline.predict_proba(list(texts))

    def weights(self):
        """Coefficient of every single word: DataFrame, words x traits."""
        grams, model = self.pipeline[0], self.pipeline[-1]
        coefficients = model.coef_ if len(model.classes_) > 2 else np.vstack([-model.coef_, model.coef_])
        table = pd.DataFrame(coefficients.T, index=grams.get_feature_names_out(), columns=self.traits)
        return table[~table.index.str.contains(" ")]

    def save(self, folder):
        joblib.dump(self.pipeline, Path(folder) / "tfidf.joblib")

    @classmethod
    def load(cls, folder, settings):
        return cls(settings, joblib.load(Path(folder) / "tfidf.joblib"))
