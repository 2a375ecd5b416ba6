"""Other projects: conversion of their weights, and faster operators for their models; one package each."""
