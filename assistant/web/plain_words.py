"""The words of the pages without Gradio, in English and Japanese."""

from __future__ import annotations

from typing import Literal

Language = Literal["en", "ja"]

ENGLISH = {
    "sign_in": "Sign in",
    "name": "Name",
    "password": "Password",
    "wrong": "Name or password is wrong.",
    "too_many": "Too many failed tries. Wait {seconds} seconds and try again.",
    "cross_site": "This form was sent from another site. Open this page again and retry.",
    "sign_out": "Sign out",
    "sign_out_question": "Do you want to sign out?",
    "back": "Back to the assistant",
    "new_password_title": "Choose a new password",
    "ends_sessions": "You will be signed out on your other devices.",
    "forced": "Your one-time password was only for the first sign-in. Choose your own now.",
    "current": "Current password",
    "new": "New password",
    "again": "New password again",
    "save": "Save password",
    "wrong_current": "The current password is wrong.",
    "not_equal": "The two new passwords differ.",
    "not_new": "Choose a password that differs from the current one.",
    "bad_length": "Use {least} to {most} characters.",
    "forbidden_title": "This page is not for your account",
    "forbidden": "{name} is signed in as {has}; this page needs {needs} or above.",
    "other_account": "Use another account",
    "staff": "staff",
    "reviewer": "reviewer",
    "operator": "operator",
    "admin": "admin",
}
JAPANESE = {
    "sign_in": "サインイン",
    "name": "名前",
    "password": "パスワード",
    "wrong": "名前またはパスワードが違います。",
    "too_many": "失敗が続きました。{seconds} 秒待ってからもう一度お試しください。",
    "cross_site": "別のサイトから送信されました。このページを開き直してお試しください。",
    "sign_out": "サインアウト",
    "sign_out_question": "サインアウトしますか?",
    "back": "アシスタントに戻る",
    "new_password_title": "新しいパスワードの設定",
    "ends_sessions": "ほかの端末ではサインアウトされます。",
    "forced": "ワンタイムパスワードは最初のサインイン専用です。ご自分のパスワードを設定してください。",
    "current": "現在のパスワード",
    "new": "新しいパスワード",
    "again": "新しいパスワード(確認)",
    "save": "保存",
    "wrong_current": "現在のパスワードが違います。",
    "not_equal": "新しいパスワードが一致しません。",
    "not_new": "現在と異なるパスワードにしてください。",
    "bad_length": "{least} 文字以上 {most} 文字以下にしてください。",
    "forbidden_title": "このページは利用できません",
    "forbidden": "{name} さんは{has}としてサインインしています。このページには{needs}以上の権限が必要です。",
    "other_account": "別のアカウントを使う",
    "staff": "スタッフ",
    "reviewer": "レビュアー",
    "operator": "オペレーター",
    "admin": "管理者",
}
WORDS: dict[Language, dict[str, str]] = {"en": ENGLISH, "ja": JAPANESE}
