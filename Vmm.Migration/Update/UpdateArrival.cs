using System.Globalization;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Cpr;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.VmStates;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Engine;
using Vmm.Migration.Status;

namespace Vmm.Migration.Update;

/// <summary>
/// The new process's side of an update. Call in order: <see cref="TakeFromEnvironment"/>; <see cref="Receive"/>; make the VM with the received
/// <see cref="VmOptions.Cpr"/> and with <see cref="VmOptions.IsIncoming"/>; <see cref="LoadAsync"/>. A host that opens the channels itself calls
/// <see cref="ReportListening"/> and <see cref="ReportRunning"/> or <see cref="ReportHeld"/> instead of Receive and LoadAsync. For one thread at a time.
/// </summary>
public sealed class UpdateArrival : IDisposable
{
    private readonly UpdateTicket? _ticket;
    private readonly OldProcess? _old;
    private CprTransferReceiver? _receiver;

    /// <summary>Makes an arrival that the host learns of by its own means, not by the environment; it sends no reports to the old process.</summary>
    /// <param name="oldPid">The process that has the VM.</param>
    public UpdateArrival(int oldPid)
    {
        OldPid = oldPid;
        if (oldPid != Environment.ProcessId) _old = new OldProcess(oldPid);
    }

    private UpdateArrival(UpdateTicket ticket)
        : this(ticket.Channels.OldPid) => _ticket = ticket;

    /// <summary>The pid of the process that has the VM; with exec that is this process.</summary>
    public int OldPid { get; }

    /// <summary>
    /// True if the old process only tries this program before it replaces itself (<see cref="UpdateOptions.TrialArguments"/>). The host then calls
    /// <see cref="TryAsync"/> and ends, with exit code 0 if that went well.
    /// </summary>
    public bool IsTrial => _ticket?.TrialWord is not null;

    /// <summary>CLOCK_MONOTONIC, ns: when the VM stopped in the program that this one replaced. 0 if the VM did not run, or without exec.</summary>
    public long StoppedAtNs => _ticket?.StoppedAtNs ?? 0;

    /// <summary>Fires once the old process has ended and its last bytes have had time to arrive; never with exec.</summary>
    public CancellationToken OldEnded => _old?.Ended ?? CancellationToken.None;

    /// <summary>Reads and removes the environment variable that the old process has set.</summary>
    /// <returns>The arrival; null if this process was not started for an update.</returns>
    /// <exception cref="ConfigurationException">The variable does not describe an update.</exception>
    public static UpdateArrival? TakeFromEnvironment()
    {
        string? text = Environment.GetEnvironmentVariable(UpdateTicket.Variable);
        if (text is null) return null;
        Environment.SetEnvironmentVariable(UpdateTicket.Variable, null);
        var ticket = UpdateTicket.Parse(text);
        // A child that was started just before an exec has inherited a variable that is not for it.
        return ticket.TrialWord is null && ticket.Channels.Cpr is null && ticket.Channels.OldPid != Environment.ProcessId ? null : new UpdateArrival(ticket);
    }

    /// <summary>
    /// Takes over what the program that this one has replaced left behind (mode cpr-exec, QEMU: <c>cpr_state_load</c>). For hosts that run without
    /// <see cref="TakeFromEnvironment"/>; <see cref="Receive"/> does it for the others.
    /// </summary>
    /// <returns>The descriptors; goes to <see cref="VmOptions.Cpr"/>. Null when this process has replaced nobody.</returns>
    /// <exception cref="VmmException">What was left is not a CPR state.</exception>
    public static CprIncoming? TakeCprExecState() => CprExec.TakeFromEnvironment();

    /// <summary>Takes the descriptors of RAM and devices; blocks until the old process has sent them.</summary>
    /// <param name="cancel">Ends the wait.</param>
    /// <returns>The descriptors, for <see cref="VmOptions.Cpr"/>. The old process waits until <see cref="LoadAsync"/> has begun.</returns>
    /// <exception cref="OperationCanceledException"><paramref name="cancel"/> fired, or the old process has ended.</exception>
    /// <exception cref="VmmException">The process cannot listen on the channel, or the received bytes are no CPR state.</exception>
    /// <exception cref="InvalidOperationException">The arrival was not taken from the environment.</exception>
    public CprIncoming Receive(CancellationToken cancel = default)
    {
        UpdateChannels channels = Ticket().Channels;
        if (channels.Cpr is null)
            return CprExec.TakeFromEnvironment() ?? throw new ConfigurationException($"{CprExec.StateVariable} is not set: this process did not replace itself by cpr-exec");
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancel, OldEnded);
        _receiver = CprTransferReceiver.Receive(channels.Cpr, limit.Token, ReportListening);
        return _receiver.Incoming;
    }

    /// <summary>Loads the VM's state and reports to the old process. Afterwards the VM runs here if it ran there.</summary>
    /// <param name="vm">The VM, in state inmigrate.</param>
    /// <param name="cancel">Ends the wait.</param>
    /// <exception cref="MigrationFailedException">
    /// The state did not arrive or could not be loaded, and the old process still has the VM; or <see cref="Vm.HeldBecause"/> says why the VM is held here.
    /// </exception>
    /// <exception cref="VmmException">The VM does not wait for a migration, or cannot listen on the channel; the old process still has the VM.</exception>
    /// <exception cref="InvalidOperationException">The arrival was not taken from the environment.</exception>
    public async Task LoadAsync(Vm vm, CancellationToken cancel = default)
    {
        ArgumentNullException.ThrowIfNull(vm);
        UpdateTicket ticket = Ticket();
        IMigrationEngine engine = vm.Services.GetRequiredService<IMigrationEngine>();
        Task<MigrationStatus> loading = engine.MigrateIncoming(ticket.Channels.Main);
        // Closing this channel lets the old process send the stream.
        _receiver?.Dispose();
        using (cancel.Register(engine.Cancel))
        using (OldEnded.Register(() =>
        {
            // A stream that has begun may be complete; if it is not, the load fails by itself.
            if (engine.Status == MigrationStatus.Setup) engine.Cancel();
        }))
        {
            MigrationStatus end = await loading.ConfigureAwait(false);
            if (vm.HeldBecause is not null)
            {
                ReportHeld();
                throw new MigrationFailedException($"update: the VM of process {OldPid} is held here: {engine.Query().Error}");
            }
            if (end != MigrationStatus.Completed || vm.RunState.State == RunState.InMigrate)
                throw new MigrationFailedException($"update: the VM of process {OldPid} has not arrived: {engine.Query().Error?.ToString() ?? end.ToWireName()}");
        }
        if (ticket.Channels.Cpr is null) File.Delete(ticket.Channels.Main.Path);
        if (ticket.RemoveDirectory is { } directory) Directory.Delete(directory, recursive: true);
        ReportRunning(engine.Query().Downtime?.AtNs ?? 0);
    }

    /// <summary>
    /// In a trial: checks that this program can load the VM, and tells the old process so. The program must know the VM's devices and the versions of their
    /// sections, and it moves a small VM of its own.
    /// </summary>
    /// <param name="services">A host with <see cref="MigrationServiceExtensions.AddMigration"/>.</param>
    /// <param name="real">What the VM would be made from here.</param>
    /// <returns>Null, or why the program cannot take the VM; then nothing was told.</returns>
    public async Task<string?> TryAsync(IServiceProvider services, VmOptions real)
    {
        ArgumentNullException.ThrowIfNull(services);
        ArgumentNullException.ThrowIfNull(real);
        UpdateTicket ticket = Ticket();
        string? problem = WhatIsMissing(ticket.Sections ?? "", [.. services.GetServices<IDeviceFactory>()], real) ?? await services.GetRequiredService<MoveRehearsal>().RunAsync(real).ConfigureAwait(false);
        if (problem is null && ticket is { TrialWord: { } word, ReportPath: { } path }) UpdateReports.SendTried(path, word);
        return problem;
    }

    /// <summary>Tells the old process that this one accepts descriptors on the CPR channel.</summary>
    public void ReportListening()
    {
        if (_ticket?.ReportPath is { } path) UpdateReports.SendListening(path);
    }

    /// <summary>Tells the old process that the VM runs here, which ends the update.</summary>
    /// <param name="runningAtNs">When the VM started here; CLOCK_MONOTONIC, ns.</param>
    public void ReportRunning(long runningAtNs)
    {
        if (_ticket?.ReportPath is { } path) UpdateReports.SendRunning(path, runningAtNs);
    }

    /// <summary>Tells the old process that this one has the VM and holds it (<see cref="Vm.HeldBecause"/>), so that it need not wait for a report that it runs.</summary>
    public void ReportHeld()
    {
        if (_ticket?.ReportPath is { } path) UpdateReports.SendHeld(path);
    }

    /// <summary>Stops watching the old process and closes the CPR channel.</summary>
    public void Dispose()
    {
        _receiver?.Dispose();
        _old?.Dispose();
    }

    private static string? WhatIsMissing(string sections, IDeviceFactory[] factories, VmOptions real)
    {
        var present = new Dictionary<string, IVmStateDescription>(StringComparer.Ordinal);
        foreach (DeviceOptions device in real.Devices)
        {
            IDeviceFactory? factory = Array.Find(factories, f => f.TypeName == device.TypeName);
            if (factory is null) return $"device type '{device.TypeName}' is not known here";
            foreach (IVmStateDescription one in factory.Descriptions) present[one.Name] = one;
        }
        foreach (string section in sections.Split(';', StringSplitOptions.RemoveEmptyEntries))
        {
            int at = section.LastIndexOf(' ');
            string name = section[..Math.Max(at, 0)];
            // The machine's own sections are no device's, and every program of this family has them.
            if (!factories.Any(f => f.Descriptions.Any(d => d.Name == name))) continue;
            if (!present.TryGetValue(name, out IVmStateDescription? mine)) return $"the VM has a section '{name}', and no device here has one";
            if (!int.TryParse(section.AsSpan(at + 1), NumberStyles.None, CultureInfo.InvariantCulture, out int version) || version < mine.MinimumVersionId || version > mine.VersionId)
                return $"the VM's section '{name}' has version {section[(at + 1)..]}, and versions {mine.MinimumVersionId} to {mine.VersionId} can be loaded here";
        }
        return null;
    }

    private UpdateTicket Ticket() => _ticket ?? throw new InvalidOperationException("this arrival has no ticket: the host opens the channels itself");
}
