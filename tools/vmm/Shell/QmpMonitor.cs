using System.Text.Json.Nodes;
using Vmm.Core.Errors;
using Vmm.Migration.Qmp;

namespace Vmm.Tools.Cli.Shell;

/// <summary>A session over <see cref="QmpClient"/>.</summary>
internal sealed class QmpMonitor : IMonitor
{
    private static readonly TimeSpan s_connectDeadline = TimeSpan.FromSeconds(5), s_answerDeadline = TimeSpan.FromSeconds(60);
    private readonly QmpClient _client;
    private readonly string _path;
    private readonly SemaphoreSlim _event = new(0);

    private QmpMonitor(QmpClient client, string path)
    {
        (_client, _path) = (client, path);
        client.EventReceived += _ => _event.Release();
    }

    public static Task<IMonitor> Connect(string path, CancellationToken cancel) => Connect(path, s_connectDeadline, cancel);

    public static async Task<IMonitor> Connect(string path, TimeSpan deadline, CancellationToken cancel)
    {
        try
        {
            // Use a dedicated thread, because it blocks until the greeting, which arrives on a pool thread.
            return new QmpMonitor(await Task.Factory.StartNew(() => QmpClient.Connect(path, deadline), cancel, TaskCreationOptions.LongRunning, TaskScheduler.Default), path);
        }
        catch (ChannelException e) when (e.Errno == Errno.ETIMEDOUT)
        {
            throw new CliException(ExitCode.Timeout, VmmException.Describe(e), e);
        }
        catch (VmmException e)
        {
            throw CliException.Unreachable(VmmException.Describe(e), inner: e);
        }
    }

    public async Task<JsonNode?> Execute(string command, JsonObject? arguments, CancellationToken cancel)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancel);
        // Add the time that the command's own argument allows.
        TimeSpan deadline = s_answerDeadline + TimeSpan.FromMilliseconds(arguments?["timeout-ms"]?.GetValue<int>() ?? 0);
        limit.CancelAfter(deadline);
        try
        {
            return await _client.ExecuteAsync(command, arguments, cancel: limit.Token);
        }
        catch (QmpErrorException e)
        {
            throw new MonitorException(e.ClassName, e.Message);
        }
        catch (ChannelException e)
        {
            throw CliException.Unreachable($"the VM closed the connection: {VmmException.Describe(e)}", inner: e);
        }
        catch (OperationCanceledException e) when (cancel.IsCancellationRequested && !IsQuery(command))
        {
            throw new CliException(ExitCode.Cancelled, $"interrupted before the VM answered: it may still do '{command}'", e);
        }
        catch (OperationCanceledException e) when (!cancel.IsCancellationRequested)
        {
            throw new CliException(ExitCode.Timeout, $"'{_path}' did not answer '{command}' within {deadline.TotalSeconds:0} s", e);
        }
    }

    public async Task RequestOutOfBand(string command)
    {
        using var limit = new CancellationTokenSource(s_answerDeadline);
        try
        {
            await _client.ExecuteAsync(command, outOfBand: true, cancel: limit.Token);
        }
        catch (Exception e) when (e is VmmException or OperationCanceledException)
        {
            // The VM does not know the command, or has gone.
        }
    }

    public async Task WaitForEvent(CancellationToken cancel)
    {
        using var waits = CancellationTokenSource.CreateLinkedTokenSource(cancel);
        Task arrives = _event.WaitAsync(waits.Token);
        await Task.WhenAny(arrives, _client.Closed);
        await waits.CancelAsync();
        while (_event.Wait(0, CancellationToken.None))
        {
            // Drop further events: the caller queries the VM's state next, which includes them.
        }
        cancel.ThrowIfCancellationRequested();
    }

    /// <summary>True for commands that change nothing, so that it does not matter whether the VM still runs them.</summary>
    private static bool IsQuery(string command) => command.StartsWith("query-", StringComparison.Ordinal) || command == "human-monitor-command";

    public async Task WaitForEnd(TimeSpan deadline)
    {
        try
        {
            await _client.Closed.WaitAsync(deadline);
        }
        catch (TimeoutException e)
        {
            throw new CliException(ExitCode.Timeout, $"the VM at '{_path}' still runs after {deadline.TotalSeconds:0} s", e);
        }
    }

    public ValueTask DisposeAsync()
    {
        _client.Dispose();
        return ValueTask.CompletedTask;
    }
}
