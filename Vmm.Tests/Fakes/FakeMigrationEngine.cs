using Vmm.Core.Channels;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Engine;
using Vmm.Migration.Parameters;
using Vmm.Migration.Status;

namespace Vmm.Tests.Fakes;

/// <summary>A migration engine whose status a test sets.</summary>
internal sealed class FakeMigrationEngine : IMigrationEngine
{
    private TaskCompletionSource<MigrationStatus> _end = new(TaskCreationOptions.RunContinuationsAsynchronously);

    internal MigrationInfo Info { get; set; } = new();
    internal List<string> Calls { get; } = [];
    internal Exception? Refusal { get; set; }

    public MigrationStatus Status { get; private set; }
    private readonly MigrationParameterSet _parameters = new();
    private readonly MigrationCapabilitySet _capabilities = new();

    public MigrationParameters Parameters { get => _parameters.Current; set => _parameters.Replace(value); }
    public MigrationCapabilities Capabilities => _capabilities.Current;
    public void SetCapabilities(IEnumerable<KeyValuePair<MigrationCapability, bool>> changes) => _capabilities.Apply(changes);
    public void SetParameters(IEnumerable<KeyValuePair<MigrationParameter, object>> changes) => _parameters.Apply(changes);
    public event Action<MigrationStatus>? StatusChanged;
    public event Action<long>? PassCompleted;
    public Func<string, OwnedFd?>? TakeNamedFd { get; set; }
    public Func<long, int, OwnedFd?>? OpenFdSet { get; set; }

    public MigrationInfo Query() => Info with { Status = Status };

    public Task<MigrationStatus> Migrate(MigrationAddress address, MigrationAddress? cpr = null) => Start(cpr is null ? $"migrate {address}" : $"migrate {address} cpr {cpr}");

    public Task<MigrationStatus> Migrate(IMigrationChannel channel) => Start("migrate channel");

    public Task<MigrationStatus> MigrateIncoming(MigrationAddress address, bool keepListening = false) => Start($"incoming {address}");

    public Task<MigrationStatus> MigrateIncoming(IMigrationChannel channel) => Start("incoming channel");

    public void Cancel() => Calls.Add("cancel");

    public void Yank() => Calls.Add("yank");

    public void Continue(MigrationStatus state) => Calls.Add($"continue {state.ToWireName()}");

    internal void Move(MigrationStatus status)
    {
        Status = status;
        StatusChanged?.Invoke(status);
        if (status.IsTerminal()) _end.TrySetResult(status);
    }

    internal void Pass(long pass) => PassCompleted?.Invoke(pass);

    private Task<MigrationStatus> Start(string call)
    {
        if (Refusal is not null) throw Refusal;
        Calls.Add(call);
        _end = new TaskCompletionSource<MigrationStatus>(TaskCreationOptions.RunContinuationsAsynchronously);
        Move(MigrationStatus.Setup);
        return _end.Task;
    }
}
