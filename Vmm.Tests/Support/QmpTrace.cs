using System.Text.Json.Nodes;
using Vmm.Migration.Qmp;

namespace Vmm.Tests.Support;

/// <summary>Records the VFIO_MIGRATION events of a VM as <c>device state</c>, through a separate QMP session.</summary>
internal sealed class QmpTrace : IDisposable
{
    private readonly QmpClient _client;
    private readonly CancellationTokenSource _stop = new(VmmCommands.Deadline);
    private readonly Task _reading;
    private readonly List<string> _events = [];
    private TaskCompletionSource _more = new(TaskCreationOptions.RunContinuationsAsynchronously);

    internal QmpTrace(string socket)
    {
        _client = QmpClient.Connect(socket, VmmCommands.Deadline);
        _reading = Task.Run(Read);
    }

    /// <summary>Waits until each of these events has come.</summary>
    /// <returns>All events so far, in order.</returns>
    internal async Task<List<string>> Wait(params string[] wanted)
    {
        while (true)
        {
            Task more;
            lock (_events)
            {
                if (wanted.All(_events.Contains)) return [.. _events];
                more = _more.Task;
            }
            await more.WaitAsync(_stop.Token);
        }
    }

    public void Dispose()
    {
        _stop.Cancel();
        _client.Dispose();
        Task.WhenAny(_reading).GetAwaiter().GetResult();
        _stop.Dispose();
    }

    private async Task Read()
    {
        await foreach (QmpEvent one in _client.Events(_stop.Token))
        {
            if (one.Name != "VFIO_MIGRATION") continue;
            JsonNode data = one.Data!;
            lock (_events)
            {
                _events.Add($"{data["device-id"]} {data["device-state"]}");
                _more.TrySetResult();
                _more = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
            }
        }
    }
}
